"""Ground truth of temporal grounding: ActivityNet Captions, {video_id: {"duration", "timestamps", "sentences"}}.

`dataloaders.formats.activitynet.read_events` reads it. Every event counts, with its times as written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.formats import lone_surrogate
from dataloaders.formats.activitynet import read_events
from pite.evaluate.metrics import Interval


@dataclass(frozen=True)
class Events:
    """One video's ground truth: sentences, and the interval of each as fractions of the duration.

    duration  seconds
    """

    intervals: tuple[Interval, ...]
    sentences: tuple[str, ...]
    duration: float = 1.0


Truth = Mapping[str, Events]
"""Events by video id, in the file's order."""


def read_truth(path: Path) -> dict[str, Events]:
    """ActivityNet Captions file -> events by video id. Raises ValueError, naming file, video and field."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        videos = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if part := lone_surrogate(videos):
        raise ValueError(f"{path}: {part}")
    if not isinstance(videos, dict) or not videos:
        raise ValueError(f"{path}: expected an object of videos {{video_id: {{duration, timestamps, sentences}}}}")
    return {video: _events(record, f"{path}: video {video!r}") for video, record in videos.items()}


def _events(record: Any, where: str) -> Events:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with duration, timestamps and sentences")
    duration, events = read_events(record, where)
    times = tuple((event.start / duration, event.end / duration) for event in events)
    return Events(times, tuple(event.sentence for event in events), duration)


def num_events(truth: Truth) -> int:
    return sum(len(events.sentences) for events in truth.values())


def without_length(truth: Truth) -> Iterator[str]:
    """The place and times in seconds of each event that is reversed or empty. No answer to it scores more than 0."""
    for video, events in truth.items():
        for i, (start, end) in enumerate(events.intervals):
            if start >= end:
                yield f"{video} sentence {i} [{start * events.duration:g}, {end * events.duration:g}]"


def outside(truth: Truth) -> Iterator[str]:
    """The place and times in seconds of each event that begins before its video or ends after it."""
    for video, events in truth.items():
        for i, (start, end) in enumerate(events.intervals):
            if min(start, end) < 0 or max(start, end) > 1:
                times = f"[{start * events.duration:g}, {end * events.duration:g}]"
                yield f"{video} sentence {i} {times} of {events.duration:g} s"
