"""Whether DALI's frames are those of PyAV: frame by frame, and compared with their neighbours in the file.

A wrong frame is often the next one or the one before, and in a slow scene these are alike. So each frame must be nearer to
PyAV's frame of its index than to the frames around that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataloaders.decode.decoder import Cropped, decode_file
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.video import frames_at, probe
from dataloaders.records import Media

MAX_DIFFERENCE = 5.0
"""Largest mean difference of a frame from PyAV's, of 255. The two interpolate colour differently, so it is not 0."""

MARGIN = 0.25
"""Mean difference, of 255, by which a frame may be nearer to a neighbour: neighbours of a still scene are the same."""


@dataclass(frozen=True)
class Agreement:
    """How frames compare with PyAV's.

    difference  the largest mean difference of a frame, of 255
    shifted     number of frames that are nearer to a neighbour in the file
    """

    difference: float
    shifted: int

    def __bool__(self) -> bool:
        return self.difference <= MAX_DIFFERENCE and not self.shifted

    def __str__(self) -> str:
        shifted = f" and {self.shifted} of its frames are others" if self.shifted else ""
        return f"differs from PyAV's by {self.difference:.1f} of 255{shifted}"


def surroundings(media: Media, num_frames: int, preprocess: Preprocess, sampling: Sampling = "index") -> Cropped:
    """PyAV's frames before, at and after each wanted one, (3 N, S, S, 3) uint8; of a still three times the same."""
    if media.kind == "image":
        return Cropped(np.repeat(decode_file(media, num_frames, preprocess).frames, 3, 0))
    probed = probe(media.path, media.clip)
    wanted = probed.indices(num_frames, sampling) - probed.first
    around = np.concatenate([wanted - 1, wanted, wanted + 1]).clip(0, probed.total - 1)
    frames = frames_at(media.path, around, probed.packets, preprocess.cropped)
    return Cropped(np.stack([frames[i] for i in around.tolist()]))


def compare(ours: np.ndarray, around: np.ndarray) -> Agreement:
    """Compare frames (N, S, S, 3) with the `surroundings` (3 N, S, S, 3)."""
    distances = np.stack(
        [np.abs(ours.astype(np.int16) - part).mean((1, 2, 3)) for part in np.split(around.astype(np.int16), 3)]
    )
    before, same, after = distances
    return Agreement(float(same.max()), int((same > np.minimum(before, after) + MARGIN).sum()))
