"""Events in a dense captioning answer, such as `[{"event": "A man runs.", "timestamps": "from 05 to 31"}, ...]`.

The published evaluation takes the characters at fixed places of the timestamps, and one fault ends its list of events.
The strict protocol reads every whole JSON object of the answer, whatever is around it: prose, a code fence, a list that
the limit of new tokens cut off, or one object per line.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pite.evaluate.protocols import Protocol

_LIST = re.compile(r"\[.*\]")
_FRAMES = re.compile(r"\D*(\d{1,3})\D+(\d{1,3})\D*")
_SAME = 0.98
"""Two neighbouring sentences with more similarity than this are one event, if their intervals touch."""


@dataclass(frozen=True)
class Event:
    """A sentence about the frames from index `start` to `end`, both included."""

    sentence: str
    start: int
    end: int


@dataclass(frozen=True)
class Events:
    """The events of one answer.

    whole  the text from the first `[` to the last `]` is valid JSON
    faults objects that are left out because they lack a sentence or two frame indices
    """

    events: tuple[Event, ...]
    whole: bool
    faults: int = 0


@dataclass(frozen=True)
class Caption:
    """A sentence and its interval in seconds."""

    sentence: str
    start: float
    end: float


def parse(answer: str, protocol: Protocol) -> Events:
    """The events in an answer, in its order; near-duplicate neighbours are not merged yet."""
    return _parse_published(answer) if protocol == "published" else _parse_strict(answer)


def captions(events: Sequence[Event], duration: float, num_frames: int) -> list[Caption]:
    """Events in seconds, near-duplicate neighbours merged: frame index e ends at (e + 1) * duration / num_frames."""
    return [
        Caption(event.sentence, event.start * duration / num_frames, (event.end + 1) * duration / num_frames)
        for event in merge(events)
    ]


def merge(events: Sequence[Event]) -> list[Event]:
    """Join neighbours whose sentences are nearly the same and whose intervals are at most one frame apart."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if last is not None and abs(event.start - last.end) <= 1 and _similarity(last, event) > _SAME:
            merged[-1] = replace(last, end=event.end)
        else:
            merged.append(event)
    return merged


def _similarity(one: Event, other: Event) -> float:
    return difflib.SequenceMatcher(None, one.sentence, other.sentence).ratio()


def _parse_published(answer: str) -> Events:
    items = _list_of(_LIST.search(answer))
    if items is None:
        return Events((), whole=False)
    events: list[Event] = []
    for item in items:
        event = _event(item, _published_frames)
        if event is None:
            return Events(tuple(events), whole=True, faults=len(items) - len(events))
        events.append(event)
    return Events(tuple(events), whole=True)


def _parse_strict(answer: str) -> Events:
    found = [_event(item, _strict_frames) for item in _objects(answer)]
    events = tuple(event for event in found if event is not None)
    whole = _list_of(re.search(_LIST.pattern, answer, re.DOTALL)) is not None
    return Events(events, whole, faults=len(found) - len(events))


def _list_of(match: re.Match[str] | None) -> list[Any] | None:
    try:
        value = None if match is None else json.loads(match[0])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text that have a field of an event; of those inside one another, the outermost."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        if isinstance(value, dict) and value.keys() & {"event", "timestamps"}:
            yield value
        else:
            end = at + 1
        at = text.find("{", end)


def _event(item: Any, frames: Callable[[str], tuple[int, int] | None]) -> Event | None:
    if not isinstance(item, dict):
        return None
    sentence, timestamps = item.get("event"), item.get("timestamps")
    if not isinstance(sentence, str) or not isinstance(timestamps, str):
        return None
    indices = frames(timestamps)
    return None if indices is None else Event(sentence, *indices)


def _published_frames(timestamps: str) -> tuple[int, int] | None:
    try:
        return int(timestamps[5:7]), int(timestamps[-2:])
    except ValueError:
        return None


def _strict_frames(timestamps: str) -> tuple[int, int] | None:
    match = _FRAMES.fullmatch(timestamps)
    return None if match is None else (int(match[1]), int(match[2]))
