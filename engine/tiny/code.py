"""The code of a frame: for each colour of the world its presence, place and shape, as numbers of about the same scale.

Both tiny models are built on it. The tiny CLIP's embedding is trained to be a rotation of a still's code. The tiny
Vicuna reads frames that are a linear map of a frame's code, with noise. So one linear map, which the demo's adapter has
to find, leads from what the CLIP sees to what the Vicuna reads.
"""

from __future__ import annotations

import numpy as np

from dataloaders.synthetic.scene import COLOURS, SHAPES, Scene

PRESENCE, X, Y, SHAPE = 0, 1, 2, 3
"""Places of a colour's numbers; `SHAPE` is the first of one for each shape."""

FIELDS = 3 + len(SHAPES)
SHAPE_SCALE = 0.5

_COLOURS = tuple(COLOURS)


def place_code(points: np.ndarray) -> np.ndarray:
    """Points in fractions of the frame -> the code's numbers, -2 to 2."""
    return 4 * (points - 0.5)


def encode(scene: Scene, frames: np.ndarray) -> np.ndarray:
    """The code of source frames (F,): (F, colours, FIELDS) float32, 0 for colours that are not visible."""
    codes = np.zeros((len(frames), len(COLOURS), FIELDS), np.float32)
    for thing in scene.things:
        shown = (thing.first <= frames) & (frames <= thing.last)
        rows = codes[:, _COLOURS.index(thing.colour)]
        rows[shown, PRESENCE] = 1.0
        rows[shown, X:SHAPE] = place_code(thing.path[frames[shown] - thing.first])
        rows[shown, SHAPE + SHAPES.index(thing.shape)] = SHAPE_SCALE
    return codes


def velocities(codes: np.ndarray, least: int = 2) -> np.ndarray:
    """Mean velocity of each colour since it appeared, in fractions of the frame for each step of the log.

    codes  (F, colours, FIELDS) exact codes of a video, in which every colour is visible without a gap
    least  steps since a colour appeared from which on it has a velocity
    Returns (F, colours, 2) float32, NaN where a colour has none.
    """
    shown = codes[..., PRESENCE] > 0
    first = shown.argmax(0)
    steps = (np.arange(len(codes))[:, None] - first)[..., None]
    start = codes[first, np.arange(codes.shape[1]), X:SHAPE]
    moved = (codes[..., X:SHAPE] - start) / 4
    return np.where(shown[..., None] & (steps >= least), moved / np.maximum(steps, 1), np.nan).astype(np.float32)
