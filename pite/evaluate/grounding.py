"""Temporal grounding: ground truth, questions to a model, prediction log, and the IoU of each answer.

Predictions are one JSON object per line: {"video_id", "task": "grounding", "query_id", "answer", "info":
{"sentence_id", "num_frames"}}. This is the format of the predecessor's evaluation, with the model's number of frames in
addition, so each program can score the other's files. Lines of other tasks are skipped. Ground truth is ActivityNet Captions: {video_id: {"duration", "timestamps", "sentences"}}.

The ground truth is read by `dataloaders.formats.activitynet.read_events`. Every event counts, with its times as written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataloaders.files import write_atomically
from dataloaders.formats import lone_surrogate
from dataloaders.formats.activitynet import read_events
from pite.evaluate.metrics import Interval, interval_iou, parse_interval

if TYPE_CHECKING:
    from pite.generate import Generator

QUESTION = "During which frames can we see {}?"
"""The predecessor's (VTimeLLM's) grounding question."""


NUM_FRAMES = 100
"""The paper's number of frames, which the predecessor's files count."""


@dataclass(frozen=True)
class Events:
    """One video's ground truth: sentences, and the interval of each as fractions of the duration."""

    intervals: tuple[Interval, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one grounding question: sentence `sentence` of video `video`.

    num_frames  frames per video of the model, which the indices in the answer count; None in the predecessor's files
    """

    video: str
    sentence: int
    answer: str
    num_frames: int | None = None


def read_ground_truth(path: Path) -> dict[str, Events]:
    """ActivityNet Captions file -> events by video id. Raises ValueError, naming file, video and field."""
    videos = _load_json(path.read_text(encoding="utf-8") if path.is_file() else _missing(path), f"{path}")
    if not isinstance(videos, dict) or not videos:
        raise ValueError(f"{path}: expected an object of videos {{video_id: {{duration, timestamps, sentences}}}}")
    return {video: _events(record, f"{path}: video {video!r}") for video, record in videos.items()}


def _events(record: Any, where: str) -> Events:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with duration, timestamps and sentences")
    # Scores count every event with its times as written.
    duration, events = read_events(record, where)
    times = tuple((event.start / duration, event.end / duration) for event in events)
    return Events(times, tuple(event.sentence for event in events))


def read_predictions(path: Path, truth: dict[str, Events]) -> list[Prediction]:
    """Grounding lines of a prediction log, each checked against the ground truth.

    Raises ValueError, naming file, line and field. Two answers to one event under one query id are refused, because the
    event would count twice.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else _missing(path)
    predictions: list[Prediction] = []
    seen: dict[tuple[str, int, int], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _load_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object with video_id, task, answer and info")
        if _field(record, "task", where) != "grounding":
            continue
        video, answer = _field(record, "video_id", where), _field(record, "answer", where)
        info = _field(record, "info", where)
        info = info if isinstance(info, dict) else {}
        sentence, num_frames = _field(info, "sentence_id", f"{where}: field 'info'"), info.get("num_frames")
        if num_frames is not None and (type(num_frames) is not int or num_frames < 1):
            raise ValueError(
                f"{where}: field 'info.num_frames' must be a whole number of at least 1, not {num_frames!r}"
            )
        if video not in truth:
            raise ValueError(f"{where}: field 'video_id' names {video!r}, which the ground truth does not have")
        if not isinstance(answer, str):
            raise ValueError(f"{where}: field 'answer' must be a string, not {answer!r}")
        if type(sentence) is not int or not 0 <= sentence < len(truth[video].sentences):
            raise ValueError(
                f"{where}: field 'info.sentence_id' is {sentence!r}, but video {video!r} has sentences "
                f"0 to {len(truth[video].sentences) - 1}"
            )
        key = (video, sentence, record.get("query_id", 0))
        if key in seen:
            raise ValueError(f"{where}: answers the same question as line {seen[key]}; keep one of the two")
        seen[key] = number
        predictions.append(Prediction(video, sentence, answer, num_frames))
    if not predictions:
        raise ValueError(f"{path}: holds no line whose task is 'grounding'")
    return predictions


def frames_of(predictions: Sequence[Prediction], given: int | None, path: Path) -> int:
    """Frames per video that the indices in the answers of a file count: its own number, else `given`, else 100.

    Raises ValueError if `given` is another number than the file's, and for answers of models with different numbers.
    """
    found = sorted({prediction.num_frames for prediction in predictions if prediction.num_frames is not None})
    if len(found) > 1:
        raise ValueError(
            f"{path}: holds answers of models with {found[0]} and with {found[1]} frames: score each alone"
        )
    if found and given not in (None, found[0]):
        raise ValueError(
            f"--num-frames {given}: the answers in {path} are of a model with {found[0]} frames; leave --num-frames out"
        )
    return found[0] if found else NUM_FRAMES if given is None else given


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write a prediction log that `read_predictions` reads."""
    lines = (
        json.dumps(
            {
                "video_id": prediction.video,
                "task": "grounding",
                "query_id": 0,
                "answer": prediction.answer,
                "info": {"sentence_id": prediction.sentence}
                | ({} if prediction.num_frames is None else {"num_frames": prediction.num_frames}),
            }
        )
        for prediction in predictions
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def answer_questions(
    generator: Generator,
    truth: dict[str, Events],
    read_features: Callable[[str], np.ndarray],
    *,
    question: str = QUESTION,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> Iterator[Prediction]:
    """The model's greedy answers to one question per event, generated in batches of `batch_size`.

    read_features  video id -> (num_frames, C)
    question       `{}` is replaced by the event's sentence
    Raises ValueError before the first answer for a question that the model cannot hold.
    """
    events = [(video, i) for video, those in truth.items() for i in range(len(those.sentences))]
    num_frames = generator.model.config.num_frames
    for video, i in events:
        generator.check_question(question_for(truth[video].sentences[i], question), num_frames)
    for start in range(0, len(events), batch_size):
        batch = events[start : start + batch_size]
        # Copied, because torch does not accept the store's read-only views.
        features = {video: np.array(read_features(video)) for video, _ in batch}
        answers = generator.answer(
            [question_for(truth[video].sentences[i], question) for video, i in batch],
            [features[video] for video, _ in batch],
            max_new_tokens=max_new_tokens,
        )
        for (video, i), answer in zip(batch, answers, strict=True):
            yield Prediction(video, i, answer.text, num_frames)


def question_for(sentence: str, question: str = QUESTION) -> str:
    """The question about one sentence, which is lower-cased and loses its full stop as in the predecessor."""
    return question.replace("{}", sentence.strip().lower().removesuffix("."))


def ious(predictions: Sequence[Prediction], truth: Mapping[str, Events], num_frames: int = 100) -> list[float]:
    """IoU (0..1) of each prediction; an answer without an interval gets 0."""
    intervals = (parse_interval(prediction.answer, num_frames) for prediction in predictions)
    return [
        interval_iou(interval, truth[prediction.video].intervals[prediction.sentence]) if interval else 0.0
        for interval, prediction in zip(intervals, predictions, strict=True)
    ]


def _missing(path: Path) -> str:
    raise ValueError(f"{path}: no such file")


def _load_json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at character {error.pos})") from None
    if part := lone_surrogate(value):
        raise ValueError(f"{where}: {part}")
    return value


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing")
    return record[name]
