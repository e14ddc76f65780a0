"""Conversations to tokens: the prompt, the supervised tokens, and the tokens with a trajectory.

    A chat between ... questions. USER: <video>\\n{question} ASSISTANT: {answer}</s>USER: ...

The text before and after the frames is tokenized separately, as LLaVA and its descendants do at inference. So a prompt
is always a prefix of its training sample. Each turn is tokenized alone, and the id of the token that ends an answer is
appended to it. The texts in between are the tokenizer's `dataloaders.samples.layouts`, above Vicuna's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataloaders.records import Sample, TokenizedSample, Turn
from dataloaders.samples.layouts import SYSTEM, as_text, end_ids, layout_of

__all__ = ["SYSTEM", "prompt_ids", "tokenize"]


def prompt_ids(
    question: str, tokenizer: PreTrainedTokenizerBase, num_frames: int, earlier: Sequence[Turn] = ()
) -> tuple[np.ndarray, int]:
    """The prompt of a question about `num_frames` frames, after `earlier` turns about them, to generate its answer.

    It is the beginning of the training sample that holds these turns. Returns token ids (n,) int64, 0 at the frames, and
    the position of the first frame. Raises ValueError for a question that is not valid Unicode, such as bytes of another
    encoding on a command line.
    """
    try:
        question.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the question {question!r} holds half of a character, which is no text") from None
    head = _head(tokenizer)
    ids = [*head, *[0] * num_frames]
    end = end_ids(tokenizer)[0]
    for i, turn in enumerate(earlier):
        ids += [*_encode_turn(tokenizer, i, turn.question, turn.answer)[0], end]
    ids += _encode_turn(tokenizer, len(earlier), question)[0]
    return np.array(ids, dtype=np.int64), len(head)


def tokenize(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, *, num_frames: int, num_points: int
) -> TokenizedSample:
    """Tokenize a sample about `num_frames` frames.

    The tokens of each answer and the one that ends it are supervised. A mention's trajectory
    (num_points, num_frames, 2) belongs to every token that overlaps its characters; if two mentions overlap a token,
    the later one wins. Raises ValueError for a tokenizer without character offsets.
    """
    head, end, layout = _head(tokenizer), end_ids(tokenizer)[0], layout_of(tokenizer)
    ids = [*head, *[0] * num_frames]
    targets: list[int] = []
    trajectory_positions: list[int] = []
    trajectories: list[np.ndarray] = []
    for i, turn in enumerate(sample.turns):
        prompt = layout.prompt(i, as_text(tokenizer, turn.question))
        tokens, offsets = _encode_turn(tokenizer, i, turn.question, turn.answer)
        starts, ends = offsets.T
        # The model generates the space before the answer: at inference the prompt ends with the colon.
        first = int(np.searchsorted(ends, len(prompt), side="right"))
        if first < len(tokens) and starts[first] < len(prompt):
            raise ValueError(
                f"the tokenizer merges the end of {prompt[-10:]!r} with the answer after it, so no prompt can end there"
            )
        owner = np.full(len(tokens), -1)
        for m, mention in enumerate(turn.mentions):
            shape = mention.trajectory.shape
            if shape != (num_points, num_frames, 2):
                raise ValueError(
                    f"sample {sample.id}: a trajectory of shape {shape}, not {(num_points, num_frames, 2)}"
                )
            begin = len(prompt) + len(layout.lead) + mention.start
            overlaps = (starts < begin + mention.end - mention.start) & (ends > begin)
            owner[overlaps] = m
        owned = np.flatnonzero(owner >= 0)
        trajectory_positions += (owned + len(ids)).tolist()
        trajectories += [turn.mentions[m].trajectory for m in owner[owned]]
        targets += range(len(ids) + first, len(ids) + len(tokens) + 1)
        ids += [*tokens, end]
    return TokenizedSample(
        id=sample.id,
        media=sample.media,
        token_ids=np.array(ids, dtype=np.int64),
        frame_start=len(head),
        num_features=num_frames,
        target_positions=np.array(targets, dtype=np.int64),
        trajectory_positions=np.array(trajectory_positions, dtype=np.int64),
        trajectory=np.array(trajectories, dtype=np.float32).reshape(-1, num_points, num_frames, 2),
    )


@lru_cache(maxsize=4)
def _head(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids before the frames, the same for all samples."""
    layout = layout_of(tokenizer)
    beginning = [tokenizer.bos_token_id] if layout.has_bos else []
    return (*beginning, *_encode(tokenizer, layout.head)[0])


def _encode_turn(
    tokenizer: PreTrainedTokenizerBase, turn: int, question: str, answer: str | None = None
) -> tuple[list[int], np.ndarray]:
    """`_encode` of a turn up to the end of its answer, or without one of its prompt."""
    layout = layout_of(tokenizer)
    text = layout.prompt(turn, as_text(tokenizer, question))
    if answer is not None:
        text += layout.answer(as_text(tokenizer, answer))
    if not turn or layout.end is None:
        return _encode(tokenizer, text)
    # After the token that ends the turn before, some tokenizers put no space where they put one at a text's beginning.
    tokens, offsets = _encode(tokenizer, layout.end + text)
    return tokens[1:], offsets[1:] - len(layout.end)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], np.ndarray]:
    """Token ids, and the span of characters (n, 2) that each covers."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoding["input_ids"], np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
