"""The media that the annotations of a data folder name: read once for all ranks and runs, with a cached list of each
annotation file.

    CACHE/stage2-pite_143k-0123456789abcdef.parquet    keys, files and clips, in the order of the records

The list holds what the records name, and nothing about the disk. Where a video has another suffix than its record
names, or is to be cut from its source, or a folder has changed, is found anew each time. A list's name contains the annotation file's size, time of its
last change and a checksum of its ends, not a checksum of the whole: the ranks would take minutes to read 27 GB of
narratives. The lists can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Container, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dataloaders import formats, records
from dataloaders.decode.containers import duration
from dataloaders.derived import (
    Malformed,
    NotWritableError,
    Records,
    Result,
    Task,
    checksum_of_code,
    line_numbers,
    make_once,
)
from dataloaders.files import file_written_atomically
from dataloaders.formats import Format, Split, parse_json, present_formats
from dataloaders.formats.fields import durations_differ, locate, names_in
from dataloaders.records import Media, RecordError, clash

CACHE = "media"
"""Name of the folder of lists in a folder of feature stores."""

_END = 1 << 20
"""Bytes at each end of an annotation file that the name of its list depends on."""

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("folder", pa.string()),  # of the media file, from the split's folder, such as images/coco
        ("name", pa.string()),  # of the media file
        ("image", pa.bool_()),
        ("start", pa.float64()),  # of the clip, null for the whole file
        ("end", pa.float64()),
        ("duration", pa.float64()),  # by the annotation, null where it gives none
        ("offset", pa.int64()),  # of the record in the annotation file
    ]
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MediaList:
    """All media in the annotations of some splits.

    media      each key once, in the order of the files; the same on every rank
    malformed  records without valid media, a sentence for each with file and line. Among them are records whose media
               have the key of an earlier record, but another file or clip
    """

    media: list[Media]
    malformed: list[str]


def list_media(
    data: Path, splits: Iterable[Split], cache: Path | None = None, processes: int | None = None
) -> MediaList:
    """All media in the annotations of `splits`.

    cache      folder for the lists. Without one, and if it cannot be written to, the annotations are read each time
    processes  worker processes that read; 0 for none, None chooses by the size of the files
    Raises RecordError for a truncated file.
    """
    media: list[Media] = []
    malformed: list[str] = []
    for split in splits:
        folder = data / split
        seen: dict[str, Media] = {}  # keys begin with their split
        for kind in present_formats(data, split):
            table = _table(folder, kind, cache, processes)
            new, clashes = _media(table, folder, seen)
            media += new
            found = [Malformed(*entry) for entry in json.loads(table.schema.metadata[b"malformed"])]
            lines = line_numbers(folder / kind.file, [offset for offset, _ in clashes])
            found += [Malformed(kind.file, line, reason) for line, (_, reason) in zip(lines, clashes)]
            malformed += [f"{folder / m.file}:{m.line}: {m.reason}" for m in sorted(found, key=lambda m: m.line)]
    return MediaList(media, malformed)


def _media(table: pa.Table, folder: Path, seen: dict[str, Media]) -> tuple[list[Media], list[tuple[int, str]]]:
    """The media of a list that are not in `seen`, to which they are added; (offset, reason) of records that clash."""
    folders = {place: folder / place for place in table["folder"].unique().to_pylist()}
    names = {place: names_in(path) for place, path in folders.items()}
    new, clashes = [], []
    for key, place, name, image, start, end, seconds, offset in zip(*(column.to_pylist() for column in table.columns)):
        clip = None if start is None else (start, end)
        named = Media(key, folders[place] / name, "image" if image else "video", clip, seconds)
        media = locate(named, names[place])
        known = seen.setdefault(key, media)
        if known is media:
            new.append(media)
        elif _differs(known, media, names[place]):
            clashes.append((offset, clash(known, media)))
    return new, clashes


def _differs(one: Media, other: Media, names: Container[str]) -> bool:
    """Whether two media are different files or clips. A suffix decides only if files of both exist."""
    if one == other:
        return False
    same = one.clip == other.clip and one.path.with_suffix("") == other.path.with_suffix("")
    return not same or (one.path.name in names and other.path.name in names)


def duration_error(media: Media, ends: Sequence[float] = ()) -> float | None:
    """Seconds by which a file is longer than its annotation states; None where nothing can be compared.

    Only whole files whose annotation gives a duration are compared.
    ends  seconds at which the pictures and the whole file end, by its packets: the nearer one is compared, because sound
          may go on after the pictures. Without them, the duration in the file's header
    """
    if media.clip is not None or media.duration is None:
        return None
    if not ends:
        try:
            lasts = duration(media.path)
        except OSError:
            return None  # The decoder reports it.
        ends = () if lasts is None else (lasts,)
    return min((end - media.duration for end in ends), key=abs, default=None)


def wrong_duration(media: Media, ends: Sequence[float] = ()) -> str | None:
    """Why a file cannot be the one that its annotation describes: it has another duration. None if it may be."""
    error = duration_error(media, ends)
    if error is None or media.duration is None or not durations_differ(media.duration + error, media.duration):
        return None
    return (
        f"{media.path}: lasts {media.duration + error:.1f} s, but its annotation is for {media.duration:.1f} s; is it "
        "another video?"
    )


def _table(folder: Path, kind: Format, cache: Path | None, processes: int | None) -> pa.Table:
    """The list of an annotation file, from `cache` or made now."""
    make = partial(_make, folder=folder, kind=kind, processes=processes)
    if cache is not None:
        path = cache / f"{folder.name}-{Path(kind.file).stem[:100]}-{_identity(folder, kind)}.parquet"
        try:
            make_once(path, "lists of media", make)
            return _open(path)
        except NotWritableError as error:
            log.warning("%s: each process reads %s itself", error, folder / kind.file)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "media.parquet"
        make(path)
        return _open(path)


def _open(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, memory_map=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and it will be made again") from None


def _identity(folder: Path, kind: Format) -> str:
    """16 hexadecimal digits: a checksum of everything that the list depends on."""
    path = folder / kind.file
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        ends = hashlib.sha256(file.read(_END))
        file.seek(max(0, status.st_size - _END))
        ends.update(file.read(_END))
    inputs = [folder.name, kind.file, status.st_size, status.st_mtime_ns, ends.hexdigest(), _code()]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


@lru_cache(1)
def _code() -> str:
    """A checksum of the code that turns records into media."""
    return checksum_of_code(formats, records, sys.modules[__name__])


def _make(path: Path, folder: Path, kind: Format, processes: int | None) -> None:
    found = Records(folder, [kind], _read, processes)
    batches: Sequence[pa.RecordBatch] = list(found)
    malformed = json.dumps([astuple(m) for m in found.malformed])
    table = pa.Table.from_batches(batches, _SCHEMA).replace_schema_metadata({"malformed": malformed})
    with file_written_atomically(path) as temporary:
        pq.write_table(table.combine_chunks(), temporary, use_dictionary=["folder"])


def _read(task: Task) -> Result[pa.RecordBatch]:
    """The media of a task's good records, and (offset, reason) of those without."""
    rows: list[tuple[object, ...]] = []
    errors: list[tuple[int, str]] = []
    split = task.path.parent
    for offset, raw in task.records():
        place = f"@{offset}"
        try:
            media = task.kind.media(parse_json(raw, place), place, split)
        except RecordError as error:
            errors.append((offset, str(error).removeprefix(f"{place}: ")))
            continue
        folder = str(media.path.parent.relative_to(split))
        clip = media.clip or (None, None)
        rows.append((media.key, folder, media.path.name, media.kind == "image", *clip, media.duration, offset))
    if not rows:
        return None, errors
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows), _SCHEMA)]
    return pa.record_batch(columns, schema=_SCHEMA), errors
