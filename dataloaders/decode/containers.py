"""Read from a container's headers whether a media file is truncated, and its duration.

A demuxer treats a truncated file as a short one, and takes a hundred times longer to find the duration.
"""

from __future__ import annotations

import stat
import struct
from pathlib import Path
from typing import BinaryIO

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_INFO, _TIME_UNIT, _LENGTH = b"\x15\x49\xa9\x66", b"\x2a\xd7\xb1", b"\x44\x89"
_UNKNOWN = 0xFFFFFFFF
"""Length of a RIFF file that was written into a pipe, where it cannot be corrected at the end."""
_BOXES_AT_START = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"heim", b"heis", b"mif1")


def truncation(path: Path) -> str | None:
    """Why a file is truncated, in words, or None without a sign of it. Supports MP4/MOV, Matroska/WebM and AVI.

    Raises OSError where the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[4:8] in _BOXES_AT_START:
            # A still has no index; its own decoder detects truncation.
            return None if head[8:12] in _STILL_BRANDS else _mp4(file, size)
        if head.startswith(_EBML):
            needed = _matroska_size(head)
        elif head.startswith(b"RIFF") and len(head) >= 8:
            length = struct.unpack("<I", head[4:8])[0]
            needed = None if length == _UNKNOWN else 8 + length
        else:
            return None
    return f"it should hold {needed} bytes and holds {size}" if needed and needed > size else None


def is_avif(path: Path) -> bool:
    """Whether a file is a still in the container of MP4: AVIF or HEIC. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS


def _mp4(file: BinaryIO, size: int) -> str | None:
    """Walk the top-level boxes of ISO/IEC 14496-12: each starts with its length and name."""
    position, names = 0, set()
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length, name = struct.unpack(">I4s", header[:8])
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        elif length == 0:
            length = size - position
        names.add(name)
        # Junk after the last box is harmless, and players ignore it. So only the boxes that matter must be complete.
        if position + length > size and name in (b"moov", b"mdat", b"moof"):
            return f"its {name.decode()!r} box should end at byte {position + length} and the file ends at {size}"
        if length < 8:
            break
        position += length
    return None if b"moov" in names else "its index (the 'moov' box) is missing"


def _matroska_size(head: bytes) -> int | None:
    """Bytes of the EBML header and the segment (RFC 8794); None where the segment's length is unknown."""
    length, start = _variable_integer(head, 4)
    end = start + (length or 0)
    if length is None or head[end : end + 4] != _SEGMENT:
        return None
    length, start = _variable_integer(head, end + 4)
    return None if length is None else start + length


def _variable_integer(data: bytes, at: int) -> tuple[int | None, int]:
    """An EBML length and the position after it; all ones mean unknown."""
    if at >= len(data) or data[at] == 0:
        return None, at
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), at + width


def duration(path: Path) -> float | None:
    """Duration of a file in seconds, read from its headers alone; None where they do not contain it.

    Supports MP4/MOV, Matroska/WebM and AVI. Raises OSError where the file cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return None  # Opening a pipe would block until another process writes to it.
    size = status.st_size
    with path.open("rb") as file:
        head = file.read(4096)
        try:
            if head[4:8] in _BOXES_AT_START:
                return _mp4_duration(file, size)
            if head.startswith(_EBML):
                return _matroska_duration(head)
            if head.startswith(b"RIFF") and head[24:28] == b"avih":
                microseconds, frames = struct.unpack_from("<I", head, 32)[0], struct.unpack_from("<I", head, 48)[0]
                return microseconds * frames / 1e6 or None
        except struct.error:  # The headers are truncated or junk.
            return None
    return None


def _mp4_duration(file: BinaryIO, size: int) -> float | None:
    """The duration in the movie header, which is the first box in the index."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(64)
        length, name, start = struct.unpack_from(">I", header)[0], header[4:8], 8
        if length == 1:
            length, start = struct.unpack_from(">Q", header, 8)[0], 16
        if name == b"moov" and header[start + 4 : start + 8] == b"mvhd":
            wide = header[start + 8] == 1
            scale, ticks = struct.unpack_from(">IQ" if wide else ">II", header, start + (28 if wide else 20))
            return ticks / scale if scale and ticks else None
        if length < 8:
            return None
        position += length
    return None


def _matroska_duration(head: bytes) -> float | None:
    """The duration in the segment's information element, which holds a time unit and a length in that unit."""
    length, start = _variable_integer(head, 4)
    position = start + (length or 0)
    if head[position : position + 4] != _SEGMENT:
        return None
    _, position = _variable_integer(head, position + 4)
    unit, ticks = 1_000_000, None
    while position < len(head):
        width = 9 - head[position].bit_length()  # An element's name is coded like a length, but keeps its marker bit.
        name = head[position : position + width]
        length, position = _variable_integer(head, position + width)
        if length is None:
            return None
        if name == _INFO:
            continue  # Its elements follow.
        if name == _TIME_UNIT:
            unit = int.from_bytes(head[position : position + length])
        elif name == _LENGTH and length in (4, 8):
            ticks = struct.unpack_from(">f" if length == 4 else ">d", head, position)[0]
        position += length
    return ticks * unit / 1e9 if ticks else None
