"""ActivityNet Captions, for evaluation: the events of a video and their times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataloaders.formats.fields import Place, duration_of, field, find_media, identifier, interval
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
    return Media(f"{folder.name}/{name}", find_media(folder / "videos", name, ".mp4"))


def read_activitynet(record: Record, where: Place, folder: Path) -> EventVideo:
    """A record {duration, timestamps: [[start, end], ...], sentences} under its `id`."""
    duration = duration_of(record, where)
    timestamps = field(record, "timestamps", list, where)
    sentences = field(record, "sentences", list, where)
    if len(timestamps) != len(sentences):
        raise RecordError(f"{where}: {len(timestamps)} 'timestamps' for {len(sentences)} 'sentences'")
    events = []
    for i, (times, sentence) in enumerate(zip(timestamps, sentences)):
        if not isinstance(sentence, str) or not sentence.strip():
            raise RecordError(f"{where}: field 'sentences[{i}]' must be a sentence, not {sentence!r}")
        events.append(Event(*interval(times, f"timestamps[{i}]", where, duration), sentence.strip()))
    media = activitynet_media(record, where, folder)
    return EventVideo(media.path.stem, media.key, duration, tuple(events))
