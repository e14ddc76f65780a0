"""Which frames stand for a video: by index, as PiTe published it, by time, or by segments, as PG-Video-LLaVA did.

The two agree where all frames are shown equally long. Where they are not, such as in recordings of a screen or of a phone
in the dark, the published rule gives frame k of N the picture of another time than k / N of the video.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Sampling = Literal["index", "time", "segments"]

IN_MANIFEST: dict[Sampling, str] = {
    "index": "linspace truncated",
    "time": "linspace in time",
    "segments": "middles of segments",
}
"""The name of each rule in a store's manifest, and so in the lineage of a model that was trained on the store."""

_ROUNDING = 1e-3
"""Seconds to which Matroska rounds the times of frames."""


def frame_indices(total: int, num_frames: int) -> np.ndarray:
    """linspace(0, total - 1, N) truncated: (N,) int64, the published sampling rule. Short videos repeat frames."""
    return np.linspace(0, total - 1, num_frames, dtype=np.int64)


def segment_indices(total: int, most: int) -> np.ndarray:
    """The frames in the middle of n = min(total, most) segments: (n,) int64, PG-Video-LLaVA's rule.

    The ends of a segment are multiples of (total - 1) / n, rounded to whole frames, halves to even ones; the middle between
    two of them is rounded down. A video of at least two frames never gives its last one.
    """
    count = min(total, most)
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    ends = np.round(np.arange(count + 1) * ((total - 1) / count)).astype(np.int64)
    return (ends[:-1] + ends[1:]) // 2


def sampled_indices(times: np.ndarray, end: float, num_frames: int, sampling: Sampling) -> np.ndarray:
    """Indices (N,) int64 of the frames that stand for a video; (0,) if it has none, at most N by segments.

    times  (total,) seconds at which each frame is shown, in order; NaN where unknown, and then indices decide
    end    seconds at which the last frame ends
    """
    if not len(times):
        return np.zeros(0, dtype=np.int64)
    if sampling == "segments":
        return segment_indices(len(times), num_frames)
    return _by_time(times, end, num_frames) if sampling == "time" else frame_indices(len(times), num_frames)


def is_uneven(times: np.ndarray, end: float, num_frames: int) -> bool:
    """Whether the two rules choose frames that are further apart than a frame's share of the video.

    The distance is from when one is first shown to when the other is, or from the end of one to the moment for which the
    other is shown, as in a slide show whose last picture stays. The share is that of one of the N frames, and of one of the
    file's own, by which both rules round.
    """
    total = len(times)
    if not total or np.isnan(times).any():
        return False
    by_index, by_time = frame_indices(total, num_frames), _by_time(times, end, num_frames)
    late = _moments(times, end, num_frames) - np.append(times[1:], end)[by_index]
    apart = np.maximum(np.abs(times[by_index] - times[by_time]), late).max()
    return bool(apart > (end - times[0]) * (1 / num_frames + 1 / total) + _ROUNDING)


def _moments(times: np.ndarray, end: float, num_frames: int) -> np.ndarray:
    """The moments (N,) at which the published rule's frames would be shown, if all were shown equally long."""
    total = len(times)
    return times[0] + np.linspace(0, total - 1, num_frames) * (end - times[0]) / total


def _by_time(times: np.ndarray, end: float, num_frames: int) -> np.ndarray:
    """The frames that are shown at those moments."""
    total, lasts = len(times), end - times[0]
    if not lasts > 0 or np.isnan(times).any():
        return frame_indices(total, num_frames)
    moments = _moments(times, end, num_frames) + min(_ROUNDING, lasts / total / 2)
    return (np.searchsorted(times, moments, side="right") - 1).astype(np.int64)
