"""Compares prompts with the published ones, under the tokenizer of the training and the one of the inference.

The published inference loads transformers 4.28's fast tokenizer. Its conversion from sentencepiece loses the merges whose piece
has the score 0, which is the first piece. This changes the ids of words that are made with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dataloaders.records import Turn
from dataloaders.samples.marked import PUBLISHED, Marks, Style, prompt_ids
from tests.golden.check import Check

if TYPE_CHECKING:
    from tests.golden.pg_check import Reference

TRANSCRIPT = '{video}\nThe noisy audio transcript of this video is:\n"'


def check(reference: Reference) -> Iterator[Check]:
    """Yield a comparison for each prompt and tokenizer."""
    config = reference.model.config
    converted = without_first_merge(reference.tokenizer)
    for i, entry in enumerate(reference.expected["prompts"]["list"]):
        system, _, rest = entry["prompt"].partition(" USER: ")
        for kind, tokenizer, style in (
            ("slow", reference.tokenizer, Style(system)),
            ("fast", converted, Style(system, PUBLISHED.strips)),
        ):
            expected = reference.cases[f"prompt.{i}.ids_{kind}"].numpy()
            rows = int((expected == config.llm.vocab_size - 3).sum())
            ids = _ids(rest, tokenizer, reference.marks(rows), style)
            ids = np.where(ids == 0, config.llm.vocab_size - 3, ids)
            same = len(ids) == len(expected) and (ids == expected).all()
            yield Check(f"prompt.{i}.ids_{kind}: different", float(not same), limit=0)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, marks: Marks, style: Style) -> np.ndarray:
    """The ids of a prompt, which begins with its first question."""
    turns = [turn.removeprefix("USER: ") for turn in text.removesuffix(" ASSISTANT:").split("</s>")]
    pairs = [turn.partition(" ASSISTANT: ")[::2] for turn in turns]
    question, _, _ = pairs[0][0].partition("\n{video}")
    transcript = pairs[0][0].partition(TRANSCRIPT)[2].removesuffix('"') if TRANSCRIPT in pairs[0][0] else None
    questions = [question, *(human for human, _ in pairs[1:])]
    earlier = [Turn(human, answer) for human, (_, answer) in zip(questions[:-1], pairs)]
    return prompt_ids(questions[-1], tokenizer, marks, earlier, style=style, transcript=transcript)[0]


def without_first_merge(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer as the old conversion made it."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [pair for pair in merges if "".join(pair) != "".join(merges[0])]
    converted = deepcopy(tokenizer)
    converted._tokenizer = Tokenizer.from_str(json.dumps(content))
    return converted
