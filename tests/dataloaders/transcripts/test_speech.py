"""Whisper and a classifier of sounds with random weights and files of their own: loaded by path, without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataloaders.transcripts.sound import RATE
from dataloaders.transcripts.speech import WINDOW, Tagger, Whisper


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whispers_text_is_that_of_its_best_tokens(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, max_target_positions=32, init_std=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = WhisperForConditionalGeneration(config).to(dtype).eval()
    model.generation_config.max_length = 8
    model.save_pretrained(tmp_path)
    _save_processor(tmp_path)
    speech = Whisper(tmp_path)
    assert speech.language(noise(2)) == "en"
    expected = _best(model.float(), noise(2))
    assert expected and speech.text(noise(2)) == expected


def _best(model: Any, sound: np.ndarray) -> str:
    """The words of the most probable token after each token, at most eight."""
    from transformers import WhisperFeatureExtractor

    features = WhisperFeatureExtractor()(sound, sampling_rate=RATE, return_tensors="pt").input_features
    tokens = [1]
    with torch.inference_mode():
        while len(tokens) < 9 and tokens[-1] != 2:
            scores = model(input_features=features, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(scores.argmax()))
    return " ".join(f"w{token - 4}" for token in tokens if token > 3)


def _save_processor(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(56))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        Whisper(tmp_path)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    """With float16 weights."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    folder = tmp_path_factory.mktemp("ast")
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, frequency_stride=64,
        time_stride=64, id2label={0: "Speech", 1: "Music", 2: "Dog"}, label2id={"Speech": 0, "Music": 1, "Dog": 2},
    )  # fmt: skip
    ASTForAudioClassification(config).half().save_pretrained(folder)
    ASTFeatureExtractor().save_pretrained(folder)
    return Tagger(folder)


def test_tags_of_long_sound_are_those_of_all_of_it(tagger: Tagger) -> None:
    parts = [np.zeros(WINDOW * RATE, np.float32), noise(WINDOW)]
    first, second = (dict(tagger(part)) for part in parts)
    both = dict(tagger(np.concatenate(parts)))
    assert first.keys() == {"Speech", "Music", "Dog"} and first != second
    assert both == pytest.approx({name: (first[name] + second[name]) / 2 for name in first}, abs=2e-3)
