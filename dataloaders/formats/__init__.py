"""Readers of the five data sets, and where their files stand in a data folder.

    DIR/stage1/localized_narratives.jsonl      DIR/stage1/images/{image_id}.jpg
    DIR/stage2/pite_143k.jsonl                 DIR/stage2/videos/{id}.mp4
    DIR/stage3/valley.json                     DIR/stage3/videos/{v_id}.mp4
    DIR/stage3/video_instruct.json             DIR/stage3/videos/{video_id}.mp4
    DIR/evaluation/activitynet_captions.json   DIR/evaluation/videos/{vid}.mp4
    DIR/evaluation/pite_143k.jsonl             DIR/evaluation/videos/{id}.mp4

A feature's key is its folder and its id, such as `stage2/v000001`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataloaders.formats.activitynet import Event, EventVideo, activitynet_media, read_activitynet
from dataloaders.formats.fields import Place
from dataloaders.formats.instructions import (
    TurnChoice,
    read_valley,
    read_video_instruct,
    valley_media,
    video_instruct_media,
)
from dataloaders.formats.narratives import narrative_media, read_narrative
from dataloaders.formats.pite_143k import pite_media, read_pite
from dataloaders.formats.stream import Record, Where, iter_json, iter_raw, load_json, parse_json
from dataloaders.records import Media, RecordError

__all__ = [
    "ROOMS",
    "Event",
    "EventVideo",
    "Format",
    "Record",
    "Room",
    "TurnChoice",
    "Where",
    "iter_json",
    "iter_media",
    "iter_raw",
    "load_json",
    "parse_json",
    "present_formats",
    "present_rooms",
    "read_activitynet",
    "read_narrative",
    "read_pite",
    "read_valley",
    "read_video_instruct",
]

Room = Literal["stage1", "stage2", "stage3", "evaluation"]


@dataclass(frozen=True)
class Format:
    """An annotation file by name, its reader (record, where, folder, **options), and the media its records name."""

    file: str
    read: Callable[..., Any]
    media: Callable[[Record, Place, Path], Media]


ROOMS: dict[Room, tuple[Format, ...]] = {
    "stage1": (Format("localized_narratives.jsonl", read_narrative, narrative_media),),
    "stage2": (Format("pite_143k.jsonl", read_pite, pite_media),),
    "stage3": (
        Format("valley.json", read_valley, valley_media),
        Format("video_instruct.json", read_video_instruct, video_instruct_media),
    ),
    "evaluation": (
        Format("activitynet_captions.json", read_activitynet, activitynet_media),
        Format("pite_143k.jsonl", read_pite, pite_media),
    ),
}
"""Folders of a data directory and the annotation files that each may hold."""


def present_formats(data: Path, room: Room) -> tuple[Format, ...]:
    """The formats whose files exist in `data`/`room`. Raises ValueError, naming what is expected, where none does."""
    if not data.is_dir():
        raise ValueError(f"{data}: no such data folder")
    present = tuple(f for f in ROOMS[room] if (data / room / f.file).is_file())
    if not present:
        raise ValueError(f"{data / room} holds none of {', '.join(f.file for f in ROOMS[room])}")
    return present


def present_rooms(data: Path) -> tuple[Room, ...]:
    """The rooms of a data folder that hold annotations. Raises ValueError where none does."""
    rooms = tuple(room for room in ROOMS if any((data / room / f.file).is_file() for f in ROOMS[room]))
    if not rooms:
        raise ValueError(f"{data} is no data folder: none of {', '.join(ROOMS)} in it holds a known annotation file")
    return rooms


def iter_media(data: Path, rooms: Iterable[Room]) -> Iterator[Media]:
    """Everything that the annotations of `rooms` name, each key once, in the order of the files.

    Raises RecordError where one key stands for two different files or clips.
    """
    seen: dict[str, Media] = {}
    for room in rooms:
        for kind in present_formats(data, room):
            path = data / room / kind.file
            for offset, _, record in iter_json(path):
                where = Where(path, offset)
                media = kind.media(record, where, data / room)
                known = seen.setdefault(media.key, media)
                if known is media:
                    yield media
                elif known != media:
                    raise RecordError(f"{where}: {media.key!r} names {media}, but {known} before")
