"""Point tracks: validation, and from a clip's own clock to the N frames the model sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dataloaders.records import ABSENT

TRACK_TOLERANCE = 0.01
"""How far, in fractions of the frame, a tracked point may lie outside it and still be clipped to its edge."""

_TIME_RESOLUTION = 1e-6
"""Seconds; records are written with rounded times, and a frame must not fall out of its event for that."""


class TrackError(ValueError):
    """Points that are no tracks: the message names the track and the sample."""


def validate_tracks(points: Any, num_points: int, tolerance: float = TRACK_TOLERANCE) -> np.ndarray:
    """Nested lists of at least P tracks of K samples [x, y] -> (P, K, 2) float64, clipped to [0, 1].

    A pair equal to (-1, -1) is absent. Raises TrackError naming the index of the first point that is NaN, lies
    further than `tolerance` outside the frame, or is half absent, and where the lists are ragged or too few.
    """
    try:
        tracks = np.asarray(points, dtype=np.float64)
    except (ValueError, TypeError):
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
    duration  of the video in seconds; frame n stands at n / (N - 1) * duration
    Returns (P, N, 2) float32. Inside the event neighbouring samples are interpolated linearly where both are present,
    else the nearer one counts, absent or not; outside the event all points are absent.
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
