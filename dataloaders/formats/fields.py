"""Typed access to the fields of a record. Every error contains the place and the field."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Container
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from dataloaders.formats.stream import Record, Where
from dataloaders.records import Media, RecordError

TIME_TOLERANCE = 0.1
"""Seconds by which a time may be outside its video: annotations and the durations in containers are rounded."""


@dataclass(frozen=True)
class Within:
    """A part of a record. Like `Where`, it becomes text only in a message, since counting lines reads the file."""

    where: Place
    part: str

    def __str__(self) -> str:
        return f"{self.where}: {self.part}"


Place = Where | Within | str
"""Place of a record, printed as `file:line`, or a part of it."""

_MEDIA_TAG = r"<(?:video|image)>"
_TAG_AT_START = re.compile(rf"\A\s*{_MEDIA_TAG}\s*")
_TAG_AT_END = re.compile(rf"\s*{_MEDIA_TAG}\s*\Z")
SENTENCE_MARK = re.compile(r"</?s>")


def shown(value: object) -> str:
    """The repr of a value for a message, at most 100 characters of it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def field(record: Record, name: str, kind: type | tuple[type, ...], where: Place) -> Any:
    """record[name], which must exist and be of `kind`. Raises RecordError."""
    if name not in record:
        raise RecordError(f"{where}: field {name!r} is missing")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise RecordError(f"{where}: field {name!r} must be {kinds}, not {type(value).__name__}")
    return value


_LONGEST_NAME = 240
"""Bytes of a file's name without its suffix; file systems allow 255 with it."""


def identifier(record: Record, name: str, where: Place) -> str:
    """An id that becomes part of a file name: not empty, not a path out of its folder, no NUL, not too long."""
    value = str(field(record, name, (str, int), where))
    path = PurePosixPath(value)
    too_long = any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in path.parts)
    if not value.strip() or path.is_absolute() or ".." in path.parts or "\0" in value or too_long:
        raise RecordError(f"{where}: field {name!r} holds {shown(value)}, which cannot name a media file")
    return value


VIDEO_SUFFIXES = (
    ".mp4",
    ".mkv",
    ".webm",
    ".avi",
    ".mov",
    ".m4v",
    ".flv",
    ".wmv",
    ".3gp",
    ".ts",
    ".mpg",
    ".mpeg",
    ".gif",
)
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, ".jpg", ".jpeg", ".png", ".webp")
"""Suffixes of media files, in order of preference, since downloaders keep the suffix of their source."""


def find_name(name: str, names: Container[str]) -> str:
    """`name`, or the same name with another of MEDIA_SUFFIXES if only that is among the `names` in its folder.

    Else the only name that differs in case or in the form of its accents (macOS decomposes them), also with another
    suffix. Of several such names none is taken, since they may be different videos.
    """
    stem = name.rpartition(".")[0]
    # A million absent files would need a look-up for each suffix.
    if name in names or (isinstance(names, frozenset) and _folded(stem) not in _by_stem(names)):
        return name
    others = [f"{stem}{suffix}" for suffix in MEDIA_SUFFIXES]
    exact = next((other for other in others if other in names), None)
    if exact is not None or not isinstance(names, frozenset):
        return exact or name
    present = _by_stem(names)[_folded(stem)]
    alike = ([found for found in present if _folded(found) == _folded(other)] for other in (name, *others))
    found = next(filter(None, alike), [])
    return found[0] if len(found) == 1 else name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@lru_cache(16)
def _by_stem(names: frozenset[str]) -> dict[str, list[str]]:
    """The names in a folder by their folded form without suffix; one frozenset hashes once."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(_folded(name.rpartition(".")[0]), []).append(name)
    return stems


_CUT = re.compile(r"(?P<source>(?:.*/)?[\w-]{11})_(?P<start>\d+(?:\.\d+)?)_(?P<end>\d+(?:\.\d+)?)", re.ASCII)
"""VATEX's name of a clip: the YouTube id of its source, which has 11 characters, and start and end in seconds."""


def cut_of(name: str) -> tuple[str, tuple[float, float]] | None:
    """The source's name and the (start, end) in seconds in a clip's name such as `Ptf_2VRj-V0_000122_000132`."""
    found = _CUT.fullmatch(name)
    if found is None or float(found["start"]) >= float(found["end"]):
        return None
    return found["source"], (float(found["start"]), float(found["end"]))


def locate(media: Media, names: Container[str]) -> Media:
    """The media in the file that exists, of the `names` in its folder.

    A video may have another suffix than its record states. The file of a clip that is named like VATEX's (`cut_of`) is
    used whole. If it does not exist, but the file of its source does, the clip is cut from that: by the record's times,
    else by those in its name.
    """
    file = find_name(media.path.name, names)
    cut = cut_of(media.path.stem) if media.kind == "video" else None
    if cut is not None and file not in names:
        source = find_name(f"{cut[0]}{media.path.suffix}", names)
        if source in names:
            return replace(media, path=media.path.with_name(source), clip=media.clip or cut[1])
    clip = media.clip
    if cut is not None and clip is not None and max(abs(a - b) for a, b in zip(clip, cut[1])) <= CUT_TOLERANCE:
        clip = None
    return (
        media
        if (file, clip) == (media.path.name, media.clip)
        else replace(media, path=media.path.with_name(file), clip=clip)
    )


CUT_TOLERANCE = 1.0
"""Seconds by which a record's clip may differ from the times in its name, which are often rounded."""

DURATION_TOLERANCE = 0.02
"""Share by which the durations of a file and of its annotation may differ, or a second where that is more."""


def durations_differ(one: float, other: float) -> bool:
    """Whether two durations in seconds differ too much to be those of one video: all times would be scaled."""
    return abs(one - other) > max(1.0, DURATION_TOLERANCE * other)


def names_in(folder: Path) -> frozenset[str]:
    """The names in a folder; none if it cannot be read. Listed again only after a change."""
    try:
        return _names(folder, folder.stat().st_mtime_ns)
    except OSError:
        return frozenset()


@lru_cache(16)
def _names(folder: Path, changed: int) -> frozenset[str]:
    """The names in a folder, listed once: checking each of a million files over a network takes minutes."""
    return frozenset(entry.name for entry in folder.iterdir())


def is_number(value: object) -> bool:
    """Whether a value of JSON is a finite number. An integer beyond the range of floats is not."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def seconds(value: Any, name: str, where: Place, duration: float = math.inf) -> float:
    """A finite time in [0, duration]. Clips up to TIME_TOLERANCE outside; raises RecordError beyond that."""
    if not is_number(value):
        raise RecordError(f"{where}: field {name!r} must be a finite number of seconds, not {shown(value)}")
    if not -TIME_TOLERANCE <= value <= duration + TIME_TOLERANCE:
        raise RecordError(f"{where}: field {name!r}: {value} s is outside the video's 0 to {duration} s")
    return min(max(float(value), 0.0), duration)


def interval(value: Any, name: str, where: Place, duration: float = math.inf) -> tuple[float, float]:
    """A pair start <= end of times in [0, duration]."""
    if not isinstance(value, list) or len(value) != 2:
        raise RecordError(f"{where}: field {name!r} must be [start, end] in seconds, not {shown(value)}")
    start, end = (seconds(v, name, where, duration) for v in value)
    if start > end:
        raise RecordError(f"{where}: field {name!r}: start {start} s comes after end {end} s")
    return start, end


def duration_of(record: Record, where: Place, name: str = "duration") -> float:
    """A video's length in seconds, finite and positive."""
    value = seconds(field(record, name, (int, float), where), name, where)
    if value <= 0:
        raise RecordError(f"{where}: field {name!r} must be positive, not {value}")
    return value


def time_to_index(seconds: float, duration: float, num_frames: int) -> int:
    """Frame index of a time: min(round(seconds / duration * N), N - 1)."""
    return min(round(seconds / duration * num_frames), num_frames - 1)


def question_of(text: str, name: str, where: Place) -> str:
    """As `clean_question`. Raises RecordError, naming the field."""
    try:
        return clean_question(text)
    except ValueError as error:
        raise RecordError(f"{where}: field {name!r}: {error}") from None


def clean_question(text: str) -> str:
    """A question without its media tag, which may be at the start or at the end, and without `</s>`.

    Raises ValueError for a tag in the middle.
    """
    text = SENTENCE_MARK.sub("", _TAG_AT_END.sub("", _TAG_AT_START.sub("", text))).strip()
    if re.search(_MEDIA_TAG, text):
        raise ValueError(f"a media tag may be at the start or end only, not as in {shown(text)}")
    return text


def answer_of(text: str, name: str, where: Place) -> str:
    """An answer without stray `</s>`. Raises RecordError if nothing remains."""
    text = SENTENCE_MARK.sub("", text).strip()
    if not text:
        raise RecordError(f"{where}: field {name!r}: the answer is empty")
    return text


def conversation(record: Record, where: Place) -> list[tuple[str, str]]:
    """(question, answer) pairs of `conversations`, as written. Raises RecordError unless human and gpt alternate."""
    messages = field(record, "conversations", list, where)
    if not messages or len(messages) % 2:
        raise RecordError(f"{where}: field 'conversations' must hold pairs of a question and an answer")
    values = []
    for i, message in enumerate(messages):
        name = f"conversations[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise RecordError(f"{where}: field '{name}' must hold 'from' and 'value' texts")
        speaker = ("human", "gpt")[i % 2]
        if message.get("from") != speaker:
            raise RecordError(f"{where}: field '{name}.from' must be {speaker!r}, not {shown(message.get('from'))}")
        values.append(message["value"])
    return list(zip(values[::2], values[1::2]))
