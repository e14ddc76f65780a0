"""How much of a held-out event is right in the model's description of the video."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.synthetic.language import TIMES_FIRST
from dataloaders.synthetic.scene import COLOURS, DIRECTIONS, SHAPES
from pite.evaluate import captioning
from pite.evaluate.captioning import java
from pite.evaluate.grounding import Events
from pite.evaluate.predictions import Prediction
from pite.generate import Generator

log = logging.getLogger(__name__)

TOLERANCE = 1
"""Frames by which an index may differ."""

_BATCH = 64
_THING = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moves ({'|'.join(DIRECTIONS)})"
_EVENT = re.compile(rf"from (\d\d) to (\d\d), {_THING}", re.IGNORECASE)
_TRUTH = re.compile(_THING, re.IGNORECASE)


@dataclass(frozen=True)
class Captions:
    """Shares of the held-out events, each found by its colour, that a description gets right.

    colour              an event of this colour is described
    shape, direction    of that event
    indices             both indices, to within `TOLERANCE` frames
    all                 everything above
    events              held-out events
    """

    colour: float
    shape: float
    direction: float
    indices: float
    all: float
    events: int


def describe(generator: Generator, videos: Sequence[str], features: Callable[[str], np.ndarray]) -> dict[str, str]:
    """The model's description of each video, with the time of each event first."""
    answers: dict[str, str] = {}
    for start in range(0, len(videos), _BATCH):
        batch = videos[start : start + _BATCH]
        # Copied, because torch does not accept the store's read-only views.
        records = [np.array(features(video)) for video in batch]
        found = generator.answer([TIMES_FIRST] * len(batch), records, max_new_tokens=80)
        answers |= {video: answer.text for video, answer in zip(batch, found, strict=True)}
    return answers


def score_captions(descriptions: Mapping[str, str], truth: Mapping[str, Events], num_frames: int) -> Captions:
    """Compare descriptions with the events of their videos. Raises ValueError if there is no event."""
    rows = []
    for video, text in descriptions.items():
        described = {event.colour: event for event in _described(text)}
        for sentence, interval in zip(truth[video].sentences, truth[video].intervals, strict=True):
            match = _TRUTH.match(sentence)
            if match is None:
                raise ValueError(f"video {video!r}: {sentence!r} is no sentence of the synthetic world")
            first, last = (min(round(time * num_frames), num_frames - 1) for time in interval)
            wanted = _Event(first, last, *match.groups())
            rows.append(_right(described.get(wanted.colour), wanted))
    if not rows:
        raise ValueError("there is no event to compare with")
    colour, shape, direction, indices, every = np.mean(rows, axis=0).tolist()
    return Captions(colour, shape, direction, indices, every, len(rows))


def score_dense(descriptions: Mapping[str, str], annotations: Path, num_frames: int) -> dict[str, float]:
    """SODA_c, METEOR and CIDEr of the described events; empty where what these need is not installed.

    annotations  ActivityNet Captions file of the videos
    """
    try:
        java.package()
    except ValueError as error:
        log.warning("no captioning scores: %s", error)
        return {}
    predictions = [
        Prediction(video, captioning.TASK, 0, json.dumps([event.as_answer() for event in _described(text)]))
        for video, text in descriptions.items()
    ]
    scores = captioning.report(predictions, captioning.read_truth(annotations), num_frames=num_frames).numbers
    return {name: float(scores[name]) for name in ("soda_c", "METEOR", "CIDEr")}


@dataclass(frozen=True)
class _Event:
    first: int
    last: int
    colour: str
    shape: str
    direction: str

    def as_answer(self) -> dict[str, str]:
        """The event as in answers to the captioning question (docs/captioning.md)."""
        thing = f"{self.colour} {self.shape}"
        return {
            "event": f"A {thing} moves {self.direction}.",
            "timestamps": f"from {self.first:02d} to {self.last:02d}",
        }


def _described(text: str) -> Iterator[_Event]:
    """The events of a description."""
    for match in _EVENT.finditer(text):
        first, last, *words = match.groups()
        yield _Event(int(first), int(last), *words)


def _right(found: _Event | None, wanted: _Event) -> tuple[bool, ...]:
    """Whether colour, shape, direction, indices and all of them are right."""
    if found is None:
        return (False,) * 5
    near = max(abs(found.first - wanted.first), abs(found.last - wanted.last)) <= TOLERANCE
    right = (True, found.shape == wanted.shape, found.direction == wanted.direction, near)
    return (*right, all(right))
