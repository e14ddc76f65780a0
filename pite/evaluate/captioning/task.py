"""The ground truth of dense captioning, its question about each video, and the answers in a prediction log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pite.evaluate import grounding
from pite.evaluate.captioning.answers import Caption
from pite.evaluate.predictions import Prediction, read_lines
from pite.evaluate.questions import Question

TASK = "captioning"

QUESTION = (
    "Could you please describe the events in the video in detail? Be specific about the activities of individuals, "
    "their surroundings, and interactions with others. The output should be in JSON format, structured as follows: "
    '{"event": "xx", "timestamps": "from xx to xx"}.'
)
"""The predecessor's (VTimeLLM's) captioning question, which published scores belong to."""

MAX_NEW_TOKENS = 1024

_ROUNDING = 1.0
"""Seconds by which two annotators' durations of one video may differ."""


@dataclass(frozen=True)
class Annotated:
    """A video's seconds, and the captions of each annotator by number; an annotator may lack a video."""

    duration: float
    annotators: Mapping[int, tuple[Caption, ...]]


Truth = Mapping[str, Annotated]
"""Annotated videos by id, in the order of the files."""


def read_truth(*paths: Path) -> dict[str, Annotated]:
    """ActivityNet Captions files, one per annotator (val_1.json, val_2.json) -> annotated videos by id.

    Raises ValueError, naming file, video and field, also for a video that has two durations.
    """
    truth: dict[str, Annotated] = {}
    for annotator, path in enumerate(paths):
        for video, events in grounding.read_truth(path).items():
            seen = truth.setdefault(video, Annotated(events.duration, {}))
            if abs(seen.duration - events.duration) > _ROUNDING:
                raise ValueError(
                    f"{path}: video {video!r}: field 'duration' is {events.duration:g}, but {seen.duration:g} in another "
                    "file of --ground-truth"
                )
            own = {annotator: _captions(events)}
            truth[video] = Annotated(seen.duration, {**seen.annotators, **own})
    return truth


def _captions(events: grounding.Events) -> tuple[Caption, ...]:
    return tuple(
        Caption(sentence, start * events.duration, end * events.duration)
        for sentence, (start, end) in zip(events.sentences, events.intervals, strict=True)
    )


def questions(truth: Truth, question: str = QUESTION) -> list[Question]:
    """One question for each video, in the order of the files."""
    return [Question(video, TASK, 0, question) for video in truth]


def read_answers(path: Path, truth: Truth) -> list[Prediction]:
    """Captioning lines of a prediction log, each checked against the ground truth.

    Raises ValueError, naming file, line and field, also for two answers about one video.
    """
    first: dict[str, str] = {}
    lines = read_lines(path, TASK)
    for line in lines:
        video = line.prediction.video
        if video not in truth:
            raise ValueError(f"{line}: field 'video_id' names {video!r}, which the ground truth does not have")
        if video in first:
            raise ValueError(f"{line}: answers about the same video as {first[video]}; keep one of the two")
        first[video] = str(line)
    if not lines:
        raise ValueError(f"{path}: holds no line whose task is {TASK!r}")
    return [line.prediction for line in lines]


def answer_of(predictions: Sequence[Prediction]) -> dict[str, str]:
    """The answer about each video."""
    return {prediction.video: prediction.answer for prediction in predictions}
