"""Packets of AV1 (AV1 bitstream specification): temporal units of one shown frame, or Irregular."""

from __future__ import annotations

from collections.abc import Iterator

from dataloaders.decode.bitstream.bits import Irregular
from dataloaders.decode.bitstream.picture import CLEAN, NOT, Picture

_SEQUENCE, _HEADERS, _KEY = 1, (3, 6), 0


class Av1:
    """Reads temporal units of AV1. Hidden frames are in the unit of a shown one."""

    def __init__(self, extradata: bytes) -> None:
        pass

    def read(self, data: bytes) -> Picture:
        """The picture of the next packet."""
        shown, restart, described, frames = 0, False, False, 0
        for kind, first in _units(data):
            described |= kind == _SEQUENCE
            if kind not in _HEADERS:
                continue
            frames += 1
            # show_existing_frame, frame_type (2), show_frame (5.9.2)
            repeats, is_shown = first >> 7, first >> 4 & 1
            shown += repeats or is_shown
            restart |= frames == 1 and described and not repeats and bool(is_shown) and first >> 5 & 3 == _KEY
        if shown != 1:
            raise Irregular("packets that are not one shown frame")
        return Picture(CLEAN if restart else NOT, hidden="" if frames == 1 else "hidden pictures")


def _units(data: bytes) -> Iterator[tuple[int, int]]:
    """Type and first payload byte of each open bitstream unit (5.3)."""
    position = 0
    while position < len(data):
        header = data[position]
        if not header & 2:
            raise Irregular("a unit without a size")
        position += 2 if header & 4 else 1
        size, shift = 0, 0
        while True:
            if position >= len(data):
                raise Irregular("a packet that ends early")
            size |= (data[position] & 127) << shift
            position, shift = position + 1, shift + 7
            if not data[position - 1] & 128:
                break
        if position + size > len(data):
            raise Irregular("a packet that ends early")
        yield header >> 3 & 15, data[position] if size else 0
        position += size
