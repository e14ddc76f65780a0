"""Prompts in the genuine ids of Llama's vocabulary, which Vicuna v1.5 has.

`llama_pieces.json` holds the pieces of the vocabulary that occur in a few texts, with their ids, all merges between them,
and the ids that the npm package llama-tokenizer-js 1.2.2 (MIT) gives for the texts, each with the space that Llama's
tokenizer adds before it. Merges only make substrings of a text, so these texts have the ids of the whole vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dataloaders.records import Mention, Sample, Turn
from dataloaders.samples.prompts import prompt_ids, tokenize

GENUINE = json.loads((Path(__file__).parent / "llama_pieces.json").read_text(encoding="utf-8"))
IDS: dict[str, list[int]] = {entry["text"]: entry["ids"] for entry in GENUINE["texts"]}
_, HEAD, DENSE, WHEN, GROUNDING, _ = IDS.values()
BOS, EOS = 1, 2
N, P = 100, 3


@pytest.fixture(scope="module", params=["normalizer", "metaspace"])
def llama(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The two forms in which releases of transformers convert Llama's tokenizer."""
    vocabulary = {
        "<unk>": 0,
        "<s>": BOS,
        "</s>": EOS,
        **{f"<0x{i:02X}>": 3 + i for i in range(256)},
        **GENUINE["pieces"],
    }
    merges = [(left, right) for left, right in GENUINE["merges"]]
    whole = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if request.param == "normalizer":
        whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", IDS)
def test_ids_are_those_of_llama(llama: PreTrainedTokenizerFast, text: str) -> None:
    assert llama(text, add_special_tokens=False).input_ids == IDS[text]


def test_35_tokens_before_the_frames(llama: PreTrainedTokenizerFast) -> None:
    ids, frame_start = prompt_ids("During which frames can we see a man open a door?", llama, N)
    assert frame_start == 35 and ids[:35].tolist() == [BOS, *HEAD]
    assert ids[:6].tolist() == [1, 319, 13563, 1546, 263, 12758]
    assert ids[35:].tolist() == [0] * N + GROUNDING


def test_a_sample_of_two_turns(llama: PreTrainedTokenizerFast) -> None:
    answer = "From 00 to 17, a red circle moves right. From 22 to 99, a cat."
    start = answer.index("a red circle")
    track = np.full((P, N, 2), 0.25, np.float32)
    first = Turn("Describe the video in detail.", answer, (Mention(start, start + len("a red circle"), track),))
    turns = first, Turn("When does a child climb a tree?", "From 25 to 75.")
    sample = tokenize(Sample("s", "m", turns), llama, num_frames=N, num_points=P)
    assert sample.token_ids.tolist() == [BOS, *HEAD, *[0] * N, *DENSE, EOS, *WHEN, EOS]
    colon = 29901  # An answer begins after the colon of "ASSISTANT:", and its end is supervised.
    begin_1 = 35 + N + len(DENSE) - DENSE[::-1].index(colon)
    end_1 = 35 + N + len(DENSE)
    begin_2 = end_1 + 1 + len(WHEN) - WHEN[::-1].index(colon)
    assert sample.target_positions.tolist() == [*range(begin_1, end_1 + 1), *range(begin_2, len(sample.token_ids))]
    assert sample.token_ids[sample.trajectory_positions].tolist() == [263, 2654, 8607]  # a, red, circle
    assert sample.trajectory.shape == (3, P, N, 2)
