"""A tokenizer in the form of Vicuna v1.5: `tokenizer.model` of sentencepiece, and no `tokenizer.json`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataloaders.records import Mention, Sample, Turn
from dataloaders.samples.prompts import prompt_ids, tokenize
from tests.text import CORPUS

N, P = 4, 1
QUESTIONS = ["Describe the video in detail.", "", "línea\nñ 🎈?"]
ANSWERS = ["From 00 to 09, a red circle moves right.", "7", "🎈 é", "  two  spaces"]


@pytest.fixture(scope="module", params=[False, True], ids=["v1.5", "legacy"])
def vicuna(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model like Llama's: byte-pair encoding, byte fallback, a space before the text."""
    directory = tmp_path_factory.mktemp("vicuna")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    options = {"add_bos_token": True, "add_eos_token": False, "legacy": request.param, "pad_token": None}
    added = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {name: {**added, "content": mark} for name, mark in marks.items()}
    settings = {"tokenizer_class": "LlamaTokenizer", **options, **tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


@pytest.fixture(scope="module")
def tokenizer(vicuna: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(vicuna))


@pytest.mark.parametrize("text", [*CORPUS, *ANSWERS])
def test_pieces_are_sentencepiece_s(vicuna: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.is_fast
    model = sentencepiece.SentencePieceProcessor(model_file=str(vicuna / "tokenizer.model"))
    # The two versions of Llama's tokenizer differ in whether a text that starts with spaces gets one more.
    text = text.strip()
    assert tokenizer(text, add_special_tokens=False).input_ids == model.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.bos_id(), model.eos_id())


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_prompt_is_a_prefix_of_the_sample(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> None:
    ids, frame_start = prompt_ids(question, tokenizer, N)
    result = tokenize(Sample("s", "m", (Turn(question, answer),)), tokenizer, num_frames=N, num_points=P)
    assert result.token_ids[: len(ids)].tolist() == ids.tolist() and result.frame_start == frame_start
    assert ids[0] == tokenizer.bos_token_id and ids[frame_start : frame_start + N].tolist() == [0] * N
    assert result.target_positions.tolist() == list(range(len(ids), len(result.token_ids)))
    *answer_ids, end = result.token_ids[result.target_positions].tolist()
    assert end == tokenizer.eos_token_id and tokenizer.decode([*ids, *answer_ids]).endswith(f"ASSISTANT: {answer}")


@pytest.mark.parametrize("phrase", ["a red circle", "red", "right", "🎈"])
def test_offsets_give_a_phrase_its_tokens(tokenizer: PreTrainedTokenizerBase, phrase: str) -> None:
    answer = "From 00 to 09, a red circle moves 🎈 right."
    start = answer.index(phrase)
    mention = Mention(start, start + len(phrase), np.full((P, N, 2), 0.5, dtype=np.float32))
    result = tokenize(Sample("s", "m", (Turn("What?", answer, (mention,)),)), tokenizer, num_frames=N, num_points=P)
    owned = result.trajectory_positions
    assert tokenizer.decode(result.token_ids[owned]).strip() == phrase
    assert owned.tolist() == list(range(owned[0], owned[-1] + 1)) and result.trajectory.shape == (len(owned), P, N, 2)
