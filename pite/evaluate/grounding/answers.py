"""The questions of temporal grounding, and the answers to them in a prediction log.

A line's `info` is {"sentence_id", "num_frames"}: the event, and the model's frames per video, which the indices in the
answer count. The predecessor's files have no `num_frames`; theirs is 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pite.evaluate.grounding.truth import Truth
from pite.evaluate.metrics import interval_iou, parse_interval
from pite.evaluate.predictions import Line, Prediction, read_lines
from pite.evaluate.protocols import Protocol
from pite.evaluate.questions import Question

TASK = "grounding"

QUESTION = "During which frames can we see {}?"
"""The predecessor's (VTimeLLM's) grounding question."""

NUM_FRAMES = 100
"""The paper's number of frames, which the predecessor's files count."""

MAX_NEW_TOKENS = 64


def questions(truth: Truth, template: str = QUESTION) -> list[Question]:
    """A question for each event, in the file's order. `{}` in the template is replaced by the event's sentence."""
    return [
        Question(video, TASK, 0, question_for(sentence, template), {"sentence_id": i})
        for video, events in truth.items()
        for i, sentence in enumerate(events.sentences)
    ]


def question_for(sentence: str, template: str = QUESTION) -> str:
    """The question about one sentence, which is lower-cased and loses its full stop as in the predecessor."""
    return template.replace("{}", sentence.strip().lower().removesuffix("."))


def read_answers(path: Path, truth: Truth) -> list[Prediction]:
    """Grounding lines of a prediction log, each checked against the ground truth.

    Raises ValueError, naming file, line and field. Two answers to one event under one query id are refused, because the
    event would count twice.
    """
    lines = read_lines(path, TASK)
    if not lines:
        raise ValueError(f"{path}: holds no line whose task is {TASK!r}")
    return [_checked(line, truth) for line in lines]


def _checked(line: Line, truth: Truth) -> Prediction:
    prediction = line.prediction
    if "sentence_id" not in prediction.info:
        raise ValueError(f"{line}: field 'info': field 'sentence_id' is missing")
    sentence, num_frames = prediction.info["sentence_id"], prediction.info.get("num_frames")
    if num_frames is not None and (type(num_frames) is not int or num_frames < 1):
        raise ValueError(f"{line}: field 'info.num_frames' must be a whole number of at least 1, not {num_frames!r}")
    if prediction.video not in truth:
        raise ValueError(f"{line}: field 'video_id' names {prediction.video!r}, which the ground truth does not have")
    events = truth[prediction.video]
    if type(sentence) is not int or not 0 <= sentence < len(events.sentences):
        raise ValueError(
            f"{line}: field 'info.sentence_id' is {sentence!r}, but video {prediction.video!r} has sentences "
            f"0 to {len(events.sentences) - 1}"
        )
    return prediction


def frames_of(predictions: Sequence[Prediction], given: int | None, source: Path) -> int:
    """Frames per video that the indices in the answers of a file count: its own number, else `given`, else 100.

    Raises ValueError if `given` is another number than the file's, and for answers of models with different numbers.
    """
    found = sorted({p.info["num_frames"] for p in predictions if p.info.get("num_frames") is not None})
    if len(found) > 1:
        raise ValueError(
            f"{source}: holds answers of models with {found[0]} and with {found[1]} frames: score each alone"
        )
    if found and given not in (None, found[0]):
        raise ValueError(
            f"--num-frames {given}: the answers in {source} are of a model with {found[0]} frames; leave --num-frames out"
        )
    return int(found[0]) if found else NUM_FRAMES if given is None else given


def ious(
    predictions: Sequence[Prediction], truth: Truth, num_frames: int = NUM_FRAMES, protocol: Protocol = "strict"
) -> list[float]:
    """IoU (0..1) of each prediction; an answer without an interval gets 0."""
    intervals = (parse_interval(prediction.answer, num_frames, protocol) for prediction in predictions)
    return [
        interval_iou(interval, truth[p.video].intervals[p.info["sentence_id"]], protocol) if interval else 0.0
        for interval, p in zip(intervals, predictions, strict=True)
    ]
