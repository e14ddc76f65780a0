"""NAL units of H.264 and HEVC: in packets of MP4 and Matroska each has its length before it, elsewhere a start code."""

from __future__ import annotations

from collections.abc import Iterator

from dataloaders.decode.bitstream.bits import Irregular

_START = b"\0\0\1"


def units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The first bytes of each NAL unit, all of a short one.

    length_size  bytes of the length before each unit; 0 where start codes separate them
    """
    yield from _by_start_code(data) if length_size == 0 else _by_length(data, length_size)


def _by_length(data: bytes, length_size: int) -> Iterator[bytes]:
    position = 0
    while position < len(data):
        start = position + length_size
        position = start + int.from_bytes(data[position:start])
        if position > len(data):
            raise Irregular("a packet that ends early")
        yield data[start:position]


def _by_start_code(data: bytes) -> Iterator[bytes]:
    at = data.find(_START)
    while at >= 0:
        start, at = at + 3, data.find(_START, at + 3)
        yield data[start : at if at >= 0 else len(data)].rstrip(b"\0")


def payload(unit: bytes) -> bytes:
    """A NAL unit without the bytes that keep start codes out of it (ITU-T H.264, 7.4.1)."""
    return unit.replace(b"\0\0\3", b"\0\0")
