"""The order in which questions are answered: a pure function of the questions, so a killed run continues in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dataloaders.partition import longest_first
from pite.evaluate.questions import Question


@dataclass(frozen=True)
class Window:
    """Videos whose frames are in memory at the same time, and batches of all questions about them.

    videos   at most the batch size
    batches  positions of questions in the plan's input; questions of a batch have similar lengths
    """

    videos: tuple[str, ...]
    batches: tuple[tuple[int, ...], ...]


def plan(questions: Sequence[Question], lengths: Sequence[int], batch_size: int) -> Iterator[Window]:
    """Windows over the videos in the order of their first question.

    Within a window the questions are sorted by length, so that batches have little padding, and split into batches of
    nearly equal size.
    lengths  tokens of each question's prompt
    """
    of_video: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        of_video.setdefault(question.video, []).append(i)
    videos = list(of_video)
    for start in range(0, len(videos), batch_size):
        window = videos[start : start + batch_size]
        members = sorted((i for video in window for i in of_video[video]), key=lambda i: lengths[i])
        count = math.ceil(len(members) / batch_size)
        ends = [len(members) * n // count for n in range(count + 1)]
        yield Window(tuple(window), tuple(tuple(members[a:b]) for a, b in pairwise(ends)))


def share_of(questions: Sequence[Question], rank: int, size: int) -> list[Question]:
    """The questions of one of `size` processes. The questions about a video stay together, in their order."""
    counts: dict[str, int] = {}
    for question in questions:
        counts[question.video] = counts.get(question.video, 0) + 1
    videos = list(counts)
    # The frames of a video cost about as much as one answer.
    bins, _ = longest_first([1 + counts[video] for video in videos], size)
    mine = {videos[i] for i in bins[rank]}
    return [question for question in questions if question.video in mine]
