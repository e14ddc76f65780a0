"""Point tracks: validation, and interpolation from a clip's clock to the N frames of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dataloaders.records import ABSENT

TRACK_TOLERANCE = 0.01
"""How far outside the frame a tracked point may be, in fractions of the frame; it is clipped to the edge."""

_TIME_RESOLUTION = 1e-6
"""Tolerance in seconds: the times of records are rounded, which must not exclude a frame from its event."""


class TrackError(ValueError):
    """Points that are not tracks. The message contains the indices of track and sample."""


def validate_tracks(points: Any, num_points: int, tolerance: float = TRACK_TOLERANCE) -> np.ndarray:
    """Nested lists of at least P tracks of K samples [x, y] -> (P, K, 2) float64, clipped to [0, 1].

    A pair equal to (-1, -1) is absent. Raises TrackError with the index of the first point that is NaN, further than
    `tolerance` outside the frame, or half absent; and for lists that are ragged or too few.
    """
    try:
        tracks = np.asarray(points, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise TrackError("points must be P tracks of K samples [x, y], equally many in each track") from None
    if tracks.ndim != 3 or tracks.shape[-1] != 2 or tracks.shape[1] == 0:
        raise TrackError(f"points must be P tracks of K samples [x, y], not of shape {tracks.shape}")
    if len(tracks) < num_points:
        raise TrackError(f"{len(tracks)} tracks where {num_points} are needed")
    tracks = tracks[:num_points]
    absent = tracks == ABSENT
    inside = (tracks >= -tolerance) & (tracks <= 1 + tolerance)
    _refuse(absent.any(-1) & ~absent.all(-1), tracks, "half absent")
    _refuse(~np.isfinite(tracks).all(-1), tracks, "not a finite number")
    _refuse(~(inside | absent).all(-1), tracks, "outside the frame")
    return np.where(absent, ABSENT, tracks.clip(0.0, 1.0))


def _refuse(bad: ArrayLike, tracks: np.ndarray, reason: str) -> None:
    if np.any(bad):
        track, sample = np.argwhere(bad)[0]
        x, y = tracks[track, sample]
        raise TrackError(f"points[{track}][{sample}] = [{x:g}, {y:g}] is {reason}")


def place_tracks(tracks: np.ndarray, times: tuple[float, float], duration: float, num_frames: int) -> np.ndarray:
    """Place a clip's tracks on the N frames of its video.

    tracks    (P, K, 2); the K samples are evenly spaced over [times[0], times[1]], both ends included
    times     seconds, on the video's clock
    duration  of the video in seconds; frame n is at n / (N - 1) * duration
    Returns (P, N, 2) float32. Inside the event, two neighbouring samples are interpolated linearly if both are present;
    otherwise the nearer one is taken, absent or not. Outside the event all points are absent.
    """
    start, end = times
    frames = np.arange(num_frames) / max(num_frames - 1, 1) * duration
    inside = (frames >= start - _TIME_RESOLUTION) & (frames <= end + _TIME_RESOLUTION)
    last = tracks.shape[1] - 1
    step = last / (end - start) if end > start else 0.0
    position = ((frames[inside] - start) * step).clip(0, last)
    before = np.floor(position).astype(np.int64)
    after = np.minimum(before + 1, last)
    weight = (position - before)[:, None]

    a, b = tracks[:, before], tracks[:, after]
    both = ((a != ABSENT) & (b != ABSENT)).all(-1, keepdims=True)
    placed = np.full((len(tracks), num_frames, 2), ABSENT, dtype=np.float32)
    placed[:, inside] = np.where(both, a + weight * (b - a), np.where(weight <= 0.5, a, b))
    return placed
