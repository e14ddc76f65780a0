"""ActivityNet Captions, for evaluation: the events of a video and their times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataloaders.formats.fields import Place, duration_of, field, identifier, interval, is_number, shown
from dataloaders.formats.stream import Record
from dataloaders.records import Media, RecordError


@dataclass(frozen=True)
class Event:
    """An event from `start` to `end`, in seconds."""

    start: float
    end: float
    sentence: str


@dataclass(frozen=True)
class EventVideo:
    """A video of `duration` seconds and its events, in the file's order."""

    id: str
    media: str
    duration: float
    events: tuple[Event, ...]


def activitynet_media(record: Record, where: Place, folder: Path) -> Media:
    """The video `folder`/videos/{vid}.mp4."""
    name = identifier(record, "id", where)
    duration = record.get("duration") if is_number(record.get("duration")) else None
    return Media(f"{folder.name}/{name}", folder / "videos" / f"{name}.mp4", duration=duration)


def read_events(record: Record, where: Place) -> tuple[float, tuple[Event, ...]]:
    """A record {duration, timestamps: [[start, end], ...], sentences}: the video's seconds, and the events as written.

    Times may be reversed or outside the video. Raises RecordError for what is no number or text.
    """
    duration = duration_of(record, where)
    timestamps = field(record, "timestamps", list, where)
    sentences = field(record, "sentences", list, where)
    if len(timestamps) != len(sentences):
        raise RecordError(f"{where}: {len(timestamps)} 'timestamps' for {len(sentences)} 'sentences'")
    events = []
    for i, (times, sentence) in enumerate(zip(timestamps, sentences)):
        if not isinstance(sentence, str):
            raise RecordError(f"{where}: field 'sentences[{i}]' must be a sentence, not {shown(sentence)}")
        if not isinstance(times, list) or len(times) != 2 or not all(map(is_number, times)):
            raise RecordError(f"{where}: field 'timestamps[{i}]' must be [start, end] in seconds, not {shown(times)}")
        events.append(Event(times[0], times[1], sentence))
    return duration, tuple(events)


def read_activitynet(record: Record, where: Place, folder: Path) -> EventVideo:
    """A record of `read_events` under its `id`; every event has a sentence and lies in the video."""
    duration, written = read_events(record, where)
    events = []
    for i, event in enumerate(written):
        if not event.sentence.strip():
            raise RecordError(f"{where}: field 'sentences[{i}]' must be a sentence, not {event.sentence!r}")
        times = interval([event.start, event.end], f"timestamps[{i}]", where, duration)
        events.append(Event(*times, event.sentence.strip()))
    media = activitynet_media(record, where, folder)
    return EventVideo(media.path.stem, media.key, duration, tuple(events))
