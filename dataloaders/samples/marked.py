"""Conversations to tokens where a video stands between two marks, as in PG-Video-LLaVA (arXiv 2311.13435).

    training     A chat between ... questions. USER: {question}\\n<video>{transcript} ASSISTANT: {answer}</s>
                 or <video>{transcript}\\n{question} ASSISTANT: ...
    inference    You are PG-Video-LLaVA, ... video. USER: {question}\\n<video>{transcript} ASSISTANT:
    <video>      the id of the start, one row for each feature, the id of the end

The published training has no transcripts. Its tokenizer strips the text on both sides of a video, and that of the published
inference keeps the spaces. `TRAINED` strips in both, so that a question is read as in training; `PUBLISHED` is the published
inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataloaders.records import Sample, TokenizedSample, Turn, VideoFirst
from dataloaders.samples.prompts import SYSTEM

PG_SYSTEM = (
    "You are PG-Video-LLaVA, a large vision-language assistant. You are able to understand the video content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail based on the provided video."
)
_TRANSCRIPT = '\nThe noisy audio transcript of this video is:\n"{}"'


@dataclass(frozen=True)
class Marks:
    """A video between two marks.

    start, end    ids of the tokens before and after it
    num_features  rows of a video's record
    video_first   which samples have the video before the question
    """

    start: int
    end: int
    num_features: int
    video_first: VideoFirst = "published"

    def is_first(self, number: int) -> bool:
        """Whether the video comes first in the sample of a record, counted from 0 in its file."""
        return self.video_first == "always" or number % 2 == 1


@dataclass(frozen=True)
class Style:
    """How a prompt is written.

    system  the sentence at its beginning
    strips  whether spaces and line breaks on both sides of a video are left out. Otherwise a space is put before every text,
            and `</s>` between turns is text, as in the tokenizer that the published inference loads
    """

    system: str
    strips: bool = True


TRAINING, TRAINED, PUBLISHED = Style(SYSTEM), Style(PG_SYSTEM), Style(PG_SYSTEM, strips=False)


def prompt_ids(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    marks: Marks,
    earlier: Sequence[Turn] = (),
    *,
    style: Style = TRAINED,
    transcript: str | None = None,
) -> tuple[np.ndarray, int]:
    """The prompt of a question about a video, after `earlier` turns about it: the first question, the video, the transcript.

    transcript  of the video's sound; None: none is given. An empty one is quoted too, as in the published chat
    Returns token ids (n,) int64, 0 at the features, and the position of the first feature.
    """
    first = earlier[0].question if earlier else question
    before, after = _around(style.system, first, False, transcript)
    if not style.strips:
        texts = [f"{turn.answer}</s>USER: {later.question} ASSISTANT:" for turn, later in _pairs(earlier, question)]
        head, tail = _spaced(tokenizer, before), _spaced(tokenizer, " ".join([after, *texts]))
        return _joined(tokenizer, head, marks, tail)
    ids = []
    for i, turn in enumerate(earlier):
        text = after.lstrip() if i == 0 else f"USER: {turn.question} ASSISTANT:"
        ids += [*_encode(tokenizer, f"{text} {turn.answer}")[0], tokenizer.eos_token_id]
    ids += _encode(tokenizer, f"USER: {question} ASSISTANT:" if earlier else after.lstrip())[0]
    return _joined(tokenizer, _encode(tokenizer, before.rstrip())[0], marks, ids)


def tokenize(sample: Sample, tokenizer: PreTrainedTokenizerBase, marks: Marks) -> TokenizedSample:
    """Tokenize a sample in the published training prompt, with its transcript after the video as in the prompt of inference.

    The tokens after each `ASSISTANT:` and the `</s>` at the end of each answer are supervised. Raises ValueError for a
    tokenizer that merges the end of a prompt with the answer after it.
    """
    before, after = _around(SYSTEM, sample.turns[0].question, sample.video_first, sample.transcript)
    head, start = _joined(tokenizer, _encode(tokenizer, before.rstrip())[0], marks, [])
    ids, targets = head.tolist(), list[int]()
    for i, turn in enumerate(sample.turns):
        prompt = f"USER: {turn.question} ASSISTANT:" if i else after.lstrip()
        tokens, offsets = _encode(tokenizer, f"{prompt} {turn.answer}")
        starts, ends = offsets.T
        first = int(np.searchsorted(ends, len(prompt), side="right"))
        if first < len(tokens) and starts[first] < len(prompt):
            raise ValueError(
                f"the tokenizer merges the end of {prompt[-10:]!r} with the answer after it, so no prompt can end there"
            )
        targets += range(len(ids) + first, len(ids) + len(tokens) + 1)
        ids += [*tokens, tokenizer.eos_token_id]
    return TokenizedSample(
        id=sample.id,
        media=sample.media,
        token_ids=np.array(ids, dtype=np.int64),
        frame_start=start,
        num_features=marks.num_features,
        target_positions=np.array(targets, dtype=np.int64),
        trajectory_positions=np.zeros(0, dtype=np.int64),
        trajectory=np.zeros((0, 1, 1, 2), dtype=np.float32),
    )


def first_row(tokenizer: PreTrainedTokenizerBase) -> int:
    """The position of the first feature of a sample whose video comes before the question."""
    return len(_encode(tokenizer, _around(SYSTEM, "", True, None)[0].rstrip())[0]) + 2


def _around(system: str, question: str, video_first: bool, transcript: str | None) -> tuple[str, str]:
    """The texts before and after the video, up to the first answer."""
    quoted = "" if transcript is None else _TRANSCRIPT.format(transcript)
    if video_first:
        return f"{system} USER: ", f"{quoted}\n{question} ASSISTANT:"
    return f"{system} USER: {question}\n", f"{quoted} ASSISTANT:"


def _pairs(earlier: Sequence[Turn], question: str) -> list[tuple[Turn, Turn]]:
    """Each earlier turn, and the one after it."""
    return list(zip(earlier, [*earlier[1:], Turn(question, "")]))


def _joined(
    tokenizer: PreTrainedTokenizerBase, head: Sequence[int], marks: Marks, tail: Sequence[int]
) -> tuple[np.ndarray, int]:
    ids = [tokenizer.bos_token_id, *head, marks.start, *[0] * marks.num_features, marks.end, *tail]
    return np.array(ids, dtype=np.int64), len(head) + 2


def _spaced(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text with one more space before it. The tokenizer adds it itself before anything but a space."""
    text = f" {text}" if text.startswith(" ") else text
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], np.ndarray]:
    """Token ids, and the span of characters (n, 2) that each covers.

    Special tokens are text: those that another program added to the tokenizer have the ids of the video's.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    return encoding["input_ids"], np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
