"""How a player turns and mirrors a decoded frame, from the display matrix of its video.

An angle cannot express a mirrored matrix, as front cameras and some editors write it. So the 2 x 2 part of the matrix is
kept, rounded to quarter turns with or without a mirror: eight cases. FFmpeg's command line gives the same pictures.
"""

from __future__ import annotations

import struct
from typing import cast

import numpy as np
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame

Orientation = tuple[int, int, int, int]
"""(a, b, c, d), each -1, 0 or 1: a pixel at (x, y) is shown at (a x + c y, b x + d y), with y downwards."""

UPRIGHT: Orientation = (1, 0, 0, 1)


def orientation(frame: VideoFrame) -> Orientation:
    """The orientation of a frame; UPRIGHT without a display matrix or with one that has no area."""
    data = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    if data is None or data.buffer_size < 20:
        return UPRIGHT
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    return nearest(a, b, c, d)


def nearest(a: int, b: int, c: int, d: int) -> Orientation:
    """The nearest quarter turn, mirrored if the matrix mirrors."""
    mirror = _sign(a * d - b * c)
    if not mirror:
        return UPRIGHT
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across = _sign(a) or mirror * _sign(d)
        return (across, 0, 0, mirror * across)
    down = _sign(b) or -mirror * _sign(c)
    return (0, down, -mirror * down, 0)


def upright(array: np.ndarray, turn: Orientation) -> np.ndarray:
    """A frame (H, W, 3) as it is shown, (W, H, 3) after a quarter turn; contiguous."""
    across, b, c, down = turn
    if turn == UPRIGHT:
        return array
    if not across:
        array, across, down = array.swapaxes(0, 1), c, b
    return np.ascontiguousarray(array[::down, ::across])


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
