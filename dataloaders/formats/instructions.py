"""Instruction data of stage 3: Valley (conversations) and VideoInstruct100K (single questions)."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Literal

from dataloaders.formats.fields import (
    MEDIA_SUFFIXES,
    Place,
    answer_of,
    conversation,
    field,
    identifier,
    question_of,
)
from dataloaders.formats.stream import Record
from dataloaders.records import Media, RecordError, Sample, Turn

TurnChoice = Literal["first", "last", "any"]


def valley_media(record: Record, where: Place, folder: Path) -> Media:
    """The video in `folder`/videos named by the first of `v_id`, `video` and `id` that holds a value.

    Jukin Media's files are named by `video`, so in its records that comes first. A suffix is optional.
    """
    names = ("v_id", "video", "id")
    if "jukin" in str(record.get("source", "")).lower():
        names = ("video", "v_id", "id")
    present = [name for name in names if name in record]
    good = [name for name in present if record[name] not in (None, "")]
    named = next(iter([*good, *present, "v_id"]))
    return _video(folder, identifier(record, named, where))


def read_valley(record: Record, where: Place, folder: Path, *, turn: TurnChoice = "first") -> Sample:
    """One turn of a conversation.

    turn  "first", "last", or "any": a turn chosen by a hash of the conversation's text, the same in every run. A later
          turn may refer to earlier ones, which the model does not see
    """
    pairs = conversation(record, where)
    if turn == "any":
        text = "\0".join(part for pair in pairs for part in pair)
        i = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % len(pairs)
    else:
        i = 0 if turn == "first" else len(pairs) - 1
    question, answer = pairs[i]
    media = valley_media(record, where, folder)
    return _sample(media, where, (question, f"conversations[{2 * i}]"), (answer, f"conversations[{2 * i + 1}]"))


def video_instruct_media(record: Record, where: Place, folder: Path) -> Media:
    """The video `folder`/videos/{video_id}.mp4."""
    return _video(folder, identifier(record, "video_id", where))


def read_video_instruct(record: Record, where: Place, folder: Path) -> Sample:
    """The question `q` and its answer `a`."""
    media = video_instruct_media(record, where, folder)
    return _sample(media, where, (field(record, "q", str, where), "q"), (field(record, "a", str, where), "a"))


def _video(folder: Path, name: str) -> Media:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in MEDIA_SUFFIXES:
        name = name[: -len(suffix)]
    file = f"{name}{suffix if suffix in MEDIA_SUFFIXES else '.mp4'}"
    return Media(f"{folder.name}/{name}", folder / "videos" / file)


def _sample(media: Media, where: Place, question: tuple[str, str], answer: tuple[str, str]) -> Sample:
    text = question_of(*question, where)
    if not text:
        raise RecordError(f"{where}: field {question[1]!r}: the question is empty")
    return Sample(media.key.partition("/")[2], media.key, (Turn(text, answer_of(*answer, where)),))
