"""Is a media file all there? Asked of the container's own lengths, because demuxers take a cut file for a short one."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_BOXES_AT_START = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def truncation(path: Path) -> str | None:
    """Why a file is cut off, in words, or None where nothing says so. Knows MP4/MOV, Matroska/WebM and AVI.

    Raises OSError where the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[4:8] in _BOXES_AT_START:
            return _mp4(file, size)
        if head.startswith(_EBML):
            needed = _matroska_size(head)
        elif head.startswith(b"RIFF") and len(head) >= 8:
            needed = 8 + struct.unpack("<I", head[4:8])[0]
        else:
            return None
    return f"it should hold {needed} bytes and holds {size}" if needed and needed > size else None


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
        # Junk after the last box is harmless, and players ignore it; only boxes that matter are held to their length.
        if position + length > size and name in (b"moov", b"mdat", b"moof"):
            return f"its {name.decode()!r} box should end at byte {position + length} and the file ends at {size}"
        if length < 8:
            break
        position += length
    return None if b"moov" in names else "its index (the 'moov' box) is missing"


def _matroska_size(head: bytes) -> int | None:
    """Bytes that the EBML header and the segment take (RFC 8794); None where the segment's length is unknown."""
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
