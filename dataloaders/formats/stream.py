"""Stream JSON files of any size, one record at a time; a record can be read again by its offset.

A regular expression over the mapped file, which matches strings and brackets only, finds the records, and each is
parsed alone. So a JSON array of a gigabyte needs the memory of one record, and processes read records by offset.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.records import RecordError

Record = dict[str, Any]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escaped surrogate: half of a character beyond the first 65,536, such as an emoji. A pair of them is valid."""

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]', re.DOTALL)


@dataclass(frozen=True)
class Where:
    """Place of a record, printed as `file:line`, or as `file:line:column` if it is not at the start of its line.

    Lines are counted only when a message needs them.
    """

    path: Path
    offset: int

    def __str__(self) -> str:
        with self.path.open("rb") as file:
            before = file.read(self.offset)
        line = before.count(b"\n") + 1
        column = self.offset - (before.rfind(b"\n") + 1) + 1
        return f"{self.path}:{line}" + (f":{column}" if column > 1 else "")


def iter_json(path: Path) -> Iterator[tuple[int, int, Record]]:
    """Yield (offset, length in bytes, parsed record) of every object in a file, in order, as `iter_raw` finds them."""
    for offset, text in iter_raw(path):
        yield offset, len(text), parse_json(text, Where(path, offset))


def iter_raw(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, text) of every object in a file, in order, for `parse_json`.

    A `.jsonl` file holds one object per line. Any other file holds one array of objects, or one object of objects
    `{key: {...}, ...}`, whose records get their key as field `id`. Raises RecordError with file and line for any other
    content, and ValueError if the file cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    with file:
        if path.suffix == ".jsonl":
            yield from _iter_lines(file)
            return
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise RecordError(f"{path}:1: the file is empty") from None
        with mapped:
            for offset, length in _find_records(path, mapped):
                yield offset, mapped[offset : offset + length]


def _iter_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in lines:
        if not line.isspace():
            yield offset, line
        offset += len(line)


def _find_records(path: Path, mapped: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Byte spans of the records of an array, or of the `"key": {...}` entries of an object."""
    outer, depth, start, end, key = b"", 0, 0, 0, None
    for token in _TOKEN.finditer(mapped):
        kind = mapped[token.start() : token.start() + 1]
        if depth == 0:
            if outer or kind not in b"[{" or mapped[: token.start()].strip():
                raise RecordError(f"{Where(path, token.start())}: expected one JSON array or object of objects")
            outer, depth, end = kind, 1, token.end()
        elif kind == b'"':
            if depth == 1 and key is None:
                key = token
        elif kind in b"[{":
            if depth == 1:
                colon = b"" if key is None else mapped[key.end() : token.start()].strip()
                if kind == b"[" or colon != (b":" if outer == b"{" else b""):
                    raise RecordError(f"{Where(path, token.start())}: expected an object, one per record")
                start = token.start() if key is None else key.start()
                if mapped[end:start].strip() != (b"" if mapped[end - 1 : end] == outer else b","):
                    raise RecordError(f"{Where(path, end)}: expected objects separated by commas")
            depth += 1
        else:
            depth -= 1
            if depth == 1:
                end, key = token.end(), None
                yield start, end - start
            elif depth == 0 and mapped[end : token.start()].strip():
                raise RecordError(f"{Where(path, end)}: expected an object, one per record")
    if depth or not outer:
        raise RecordError(f"{Where(path, len(mapped))}: the file ends before its closing bracket; was it cut off?")


def parse_json(text: bytes, where: object) -> Record:
    """Parse a record of `iter_raw`. Raises RecordError with `where` unless it is a JSON object of valid Unicode."""
    keyed = text.startswith(b'"')
    try:
        # From bytes, json would accept half of a surrogate pair, which is not valid UTF-8.
        decoded = text.decode("utf-8-sig")
        value = json.loads(f"{{{decoded}}}" if keyed else decoded)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not valid JSON ({error})") from None
    if keyed:
        ((key, value),) = value.items()
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected a JSON object, not {type(value).__name__}")
    record = {**value, "id": key} if keyed else value
    if _SURROGATE.search(text) and (fault := lone_surrogate(record)):
        raise RecordError(f"{where}: {fault}")
    return record


def lone_surrogate(value: object) -> str | None:
    """An error message if a string or key of parsed JSON holds half of a surrogate pair; None without one.

    Software that cuts a text between UTF-16 units leaves such an escape, half of an emoji. No tokenizer accepts it.
    """
    rest = [("", value)]
    while rest:
        place, item = rest.pop()
        if isinstance(item, list):
            rest += [(f"{place}[{i}]", part) for i, part in enumerate(item)]
        elif isinstance(item, dict):
            rest += [(f"{place}.{key}" if place else key, part) for key, part in item.items()]
            rest += [(f"{place} (a key)", key) for key in item]
        elif isinstance(item, str) and (half := _first_surrogate(item)):
            return f"field {place!r}: {half} is half of a surrogate pair, which is not a character"
    return None


def _first_surrogate(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
