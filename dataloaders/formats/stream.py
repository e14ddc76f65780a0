"""Stream JSON files of any size, one record at a time; a record can be read again by its offset.

A regular expression over the mapped file, which matches strings and brackets only, finds the records, and each is
parsed alone. So a JSON array of a gigabyte needs the memory of one record, and processes read records by offset.
"""

from __future__ import annotations

import codecs
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
_STRAY = re.compile(rb'(?:"[^"\\]*(?:\\.[^"\\]*)*"|[^",])+|,', re.DOTALL)
"""An entry of an array or object that holds no bracket, such as a number, or the comma after an entry."""

_FIELD = re.compile(rb'\{\s*"[^"\\]*(?:\\.[^"\\]*)*"\s*:\s*"', re.DOTALL)
"""The beginning of a record whose first value is a text."""

_UTF8, _UTF16 = codecs.BOM_UTF8, (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_HEAD = 4096
"""Bytes at the beginning of a file that must contain more than spaces."""


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
    """Yield (offset, text) of every record in a file, in order, for `parse_json`.

    The file is an array of objects; or JSON Lines, an object per line; or an object of objects `{key: {...}, ...}`, whose
    records get their key as field `id`. Its first bytes decide, whatever its name: `[` begins an array. `{` begins an
    object of objects, but JSON Lines in a `.jsonl` file, where the next line begins with `{` too, and where the first
    value is a text. A byte order mark is skipped. Entries that are no objects are yielded too, and `parse_json` refuses them one by one.
    Raises RecordError with file and line for brackets and commas that are not those of JSON, and ValueError if the file
    cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    with file:
        head = file.read(_HEAD)
        file.seek(0)
        if head.startswith(_UTF16):
            raise RecordError(f"{path}:1: the file is in UTF-16; convert it to UTF-8, such as with iconv")
        if path.suffix == ".jsonl" and not _content(head).startswith(b"["):
            yield from _iter_lines(path, file)
            return
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise RecordError(f"{path}:1: the file is empty") from None
        with mapped:
            if _FIELD.match(_content(head)) or _holds_lines(mapped):
                yield from _iter_lines(path, file)
                return
            for offset, length in _find_records(path, mapped):
                yield offset, mapped[offset : offset + length]


def _content(text: bytes) -> bytes:
    """Text without byte order mark and spaces around it."""
    return text.removeprefix(_UTF8).strip()


def _holds_lines(mapped: mmap.mmap) -> bool:
    """Whether the first line ends with `}` and the next one that is not empty begins with `{`."""
    end = mapped.find(b"\n")
    before, after = mapped[max(0, end - _HEAD) : max(0, end)], mapped[end + 1 : end + 1 + _HEAD]
    return end > 0 and before.rstrip().endswith(b"}") and after.lstrip().startswith(b"{")


def _iter_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in lines:
        if _content(line):
            if not line.endswith(b"\n") and _content(line).startswith(b"{") and not _is_json(line):
                raise RecordError(f"{Where(path, offset)}: the file ends in the middle of a record; was it cut off?")
            yield offset, line
        offset += len(line)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _find_records(path: Path, mapped: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Byte spans of the entries of an array, or of the `"key": value` entries of an object."""
    outer, depth, start, end, key = b"", 0, 0, 0, None
    for token in _TOKEN.finditer(mapped):
        kind = mapped[token.start() : token.start() + 1]
        if depth == 0:
            if outer or kind not in b"[{" or _content(mapped[: token.start()]):
                raise RecordError(f"{Where(path, token.start())}: expected one JSON array or object of objects")
            outer, depth, end = kind, 1, token.end()
        elif kind == b'"':
            if depth == 1:
                key = token
        elif kind in b"[{":
            if depth == 1:
                start = token.start()
                if outer == b"{":
                    if key is None or mapped[key.end() : start].strip() != b":":
                        raise RecordError(f"{Where(path, start)}: expected a key and a colon before an object")
                    start = key.start()
                yield from _strays(path, mapped, end, start, first=mapped[end - 1 : end] == outer)
            depth += 1
        else:
            depth -= 1
            if depth == 1:
                end, key = token.end(), None
                yield start, end - start
            elif depth == 0:
                yield from _strays(path, mapped, end, token.start(), first=mapped[end - 1 : end] == outer, last=True)
    if depth or not outer:
        raise RecordError(f"{Where(path, len(mapped))}: the file ends before its closing bracket; was it cut off?")


def _strays(
    path: Path, mapped: mmap.mmap, begin: int, end: int, first: bool, last: bool = False
) -> Iterator[tuple[int, int]]:
    """Spans of the entries without brackets between two others, or between one and the outer bracket.

    first, last  whether the text begins after the opening bracket, and ends at the closing one
    Raises RecordError for missing and repeated commas.
    """
    text = mapped[begin:end].strip()
    if text == (b"" if first or last else b","):  # Nearly always.
        return
    wants_entry = first
    for part in _STRAY.finditer(mapped, begin, end):
        content = part[0].strip()
        if not content:
            continue
        if wants_entry == (content == b","):
            raise RecordError(f"{Where(path, begin)}: expected entries separated by commas")
        wants_entry = not wants_entry
        if content != b",":
            yield part.end() - len(part[0].lstrip()), len(content)
    if wants_entry == last:
        raise RecordError(f"{Where(path, begin)}: expected entries separated by commas")


def parse_json(text: bytes, where: object) -> Record:
    """Parse a record of `iter_raw`. Raises RecordError with `where` unless it is a JSON object of valid Unicode."""
    keyed = text.startswith(b'"') and text[-1:] != b'"'
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
