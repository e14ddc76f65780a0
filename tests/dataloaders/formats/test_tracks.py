"""Tracks: refusals with their place, and placement on frames against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dataloaders.formats.tracks import TRACK_TOLERANCE, TrackError, place_tracks, validate_tracks
from dataloaders.records import ABSENT

GONE = [ABSENT, ABSENT]


def plain_placement(
    tracks: np.ndarray, times: tuple[float, float], duration: float, num_frames: int
) -> list[list[list[float]]]:
    """The definition of `place_tracks`, point by point."""
    placed = []
    for track in tracks.tolist():
        row = []
        for n in range(num_frames):
            time = n / (num_frames - 1) * duration if num_frames > 1 else 0.0
            if not times[0] - 1e-6 <= time <= times[1] + 1e-6:
                row.append(GONE)
                continue
            share = (time - times[0]) / (times[1] - times[0]) if times[1] > times[0] else 0.0
            position = min(max(share, 0.0), 1.0) * (len(track) - 1)
            i = min(math.floor(position), len(track) - 1)
            j, weight = min(i + 1, len(track) - 1), position - i
            if GONE in (track[i], track[j]):
                row.append(track[i] if weight <= 0.5 else track[j])
            else:
                row.append([a + weight * (b - a) for a, b in zip(track[i], track[j])])
        placed.append(row)
    return placed


@pytest.mark.parametrize("seed", range(20))
def test_placement_equals_the_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tracks = rng.random((3, int(rng.integers(1, 12)), 2))
    tracks[rng.random(tracks.shape[:2]) < 0.3] = ABSENT
    duration = float(rng.uniform(1, 60))
    times = tuple(sorted(rng.uniform(0, duration, 2).tolist()))
    placed = place_tracks(tracks, times, duration, n := int(rng.integers(1, 40)))
    assert placed.shape == (3, n, 2) and placed.dtype == np.float32
    np.testing.assert_allclose(placed, plain_placement(tracks, times, duration, n), atol=1e-6)


def test_samples_at_frames_are_kept_exactly() -> None:
    tracks = np.random.default_rng(0).random((2, 10, 2))
    assert np.array_equal(place_tracks(tracks, (0.0, 9.0), 9.0, 10), tracks.astype(np.float32))


def test_absent_neighbours_take_the_nearer_sample() -> None:
    tracks = np.array([[[0.0, 0.0], GONE, [0.4, 0.8]]])
    placed = place_tracks(tracks, (0.0, 2.0), 2.0, 11)[0, :, 0]
    expected = [0, 0, 0, -1, -1, -1, -1, -1, 0.4, 0.4, 0.4]
    np.testing.assert_allclose(placed, expected, atol=1e-6)


def test_nothing_outside_the_event() -> None:
    placed = place_tracks(np.full((1, 4, 2), 0.5), (2.0, 4.0), 10.0, 11)
    assert (placed[0, :, 0] == 0.5).nonzero()[0].tolist() == [2, 3, 4]
    assert (placed[0, [0, 1, 5, 10]] == ABSENT).all()


def test_rounded_times_do_not_lose_the_last_frame() -> None:
    duration = 9.5
    start, end = round(3 / 31 * duration, 6), round(20 / 31 * duration, 6)
    placed = place_tracks(np.full((1, 2, 2), 0.5), (start, end), duration, 32)
    assert (placed[0, :, 0] == 0.5).nonzero()[0].tolist() == list(range(3, 21))


def test_interpolation_stays_between_its_ends() -> None:
    tracks = np.random.default_rng(0).integers(0, 2, (5, 7, 2)).astype(float)
    placed = place_tracks(tracks, (0.1, 7.7), 8.0, 100)
    present = placed[(placed != ABSENT).all(-1)]
    assert present.min() >= 0 and present.max() <= 1 and len(present)


def test_validation_keeps_the_first_tracks_and_clips() -> None:
    edge = TRACK_TOLERANCE / 2
    tracks = validate_tracks([[[-edge, 1 + edge], [-1, -1]], [[0.5, 0.5], [0, 1]], [[9, 9], [9, 9]]], 2)
    assert tracks.tolist() == [[[0, 1], GONE], [[0.5, 0.5], [0, 1]]]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[[0.1, 0.1], [math.nan, 0.2]]], r"points\[0\]\[1\] = \[nan, 0.2\] is not a finite number"),
        ([[[0.1, math.inf], [0.1, 0.2]]], r"points\[0\]\[0\] = \[0.1, inf\] is not a finite number"),
        ([[[0.1, 0.1], [0.1, 1.02]]], r"points\[0\]\[1\] = \[0.1, 1.02\] is outside the frame"),
        ([[[-0.5, 0.1], [0.1, 0.2]]], r"points\[0\]\[0\] = \[-0.5, 0.1\] is outside the frame"),
        ([[[-1, 0.1], [0.1, 0.2]]], r"points\[0\]\[0\] = \[-1, 0.1\] is half absent"),
        ([[[0.1, 0.1], [0.1, -1]]], r"points\[0\]\[1\] = \[0.1, -1\] is half absent"),
        ([], "0"),
        ([[[0.1, 0.1]], [[0.1, 0.1], [0.2, 0.2]]], "equally many"),
        ([[[0.1, 0.1, 0.1]]], r"not of shape \(1, 1, 3\)"),
        ([[]], r"not of shape"),
        ([[["a", "b"]]], "must be"),
        ([[None]], "must be"),
    ],
)
def test_refusals(points: list, message: str) -> None:
    with pytest.raises(TrackError, match=message):
        validate_tracks(points, 1)


def test_too_few_tracks() -> None:
    with pytest.raises(TrackError, match="1 tracks where 3 are needed"):
        validate_tracks([[[0.1, 0.1]]], 3)
