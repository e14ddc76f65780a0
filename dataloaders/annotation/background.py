"""What a scene shows without the things that move: the median over time, where the camera stands still.

A place that shows the background shows no object, however much the colours are alike, such as a dark coat and a dark
road. So an object that has left is not found again in the ground where it stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.annotation.tracking import frames_until

SAMPLES = 24
"""Frames of which the median is taken, spread over all events of a video."""

_STILL = 0.6
"""Share of the pixels that a frame has in common with the median if the camera stands still."""
_SAME = 24
"""Largest difference of a colour channel, of 255, between a pixel and the background."""
_OBJECT, _AROUND = 0.65, 0.2
"""Shares above which the background is not used for an object: of its box that shows the background in its first
frame, so the object does not move; and of its surroundings that are not settled, so it moves little."""


@dataclass(frozen=True)
class Background:
    """The median of a scene, and the pixels in which the first half of the time has the same median as the second.

    picture  (H, W, 3) uint8
    settled  (H, W) bool
    """

    picture: np.ndarray
    settled: np.ndarray


def find_background(path: Path, first: int, last: int) -> Background | None:
    """The background from frame `first` to `last` of a video; None where the camera moves or cuts."""
    wanted = set(np.linspace(first, last, SAMPLES).round().astype(int).tolist())
    return background_of([frame for _, frame in frames_until(path, wanted)])


def background_of(frames: Sequence[np.ndarray]) -> Background | None:
    """The background of frames (H, W, 3) uint8 in order, or None where most of them have little in common."""
    if len(frames) < 6:
        return None
    picture = _median(frames)
    if np.median([shows(frame, picture).mean() for frame in frames]) < _STILL:
        return None
    half = len(frames) // 2
    return Background(picture, shows(_median(frames[:half]), _median(frames[half:])))


def _median(frames: Sequence[np.ndarray]) -> np.ndarray:
    middle = len(frames) // 2
    return np.asarray(np.partition(np.stack(frames), middle, axis=0)[middle])


def shows(frame: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The pixels (H, W) bool of a frame that show the same as a picture."""
    return np.asarray((np.maximum(frame, picture) - np.minimum(frame, picture)).max(-1) < _SAME)


def known_pixels(first: np.ndarray, background: Background, box: np.ndarray) -> np.ndarray | None:
    """The pixels (H, W) bool in which the background can be trusted for an object, from its first frame and box (4,).

    Around the box these are the ones in which the first frame shows it, and in the box those in which it does not. So a
    median that shows the object, which later stands somewhere for long, does not count against it there. None for an
    object that moves too little to be separated from the background.
    """
    left, top, right, bottom = np.rint(box).astype(int)
    inside = np.s_[top:bottom, left:right]
    around = np.s_[max(0, 2 * top - bottom) : 2 * bottom - top, max(0, 2 * left - right) : 2 * right - left]
    same = shows(first, background.picture)
    if same[inside].mean() > _OBJECT or background.settled[around].mean() < 1 - _AROUND:
        return None
    same[inside] = ~same[inside]
    return same & background.settled
