"""Tracks to key points: k-means++ over whole trajectories (PiTe section 3.2), then the track nearest to each mean.

The paper does not specify whether a key point is a cluster's mean or one of its tracks. A mean jumps when a track is
lost, so this module takes a track. Every coordinate of a record was therefore measured.
"""

from __future__ import annotations

import numpy as np

from dataloaders.records import ABSENT

_ROUNDS = 50


def key_points(tracks: np.ndarray, num_points: int, seed: int = 0) -> np.ndarray | None:
    """Choose P of M tracks (M, K, 2), (-1, -1) where absent: (P, K, 2), or None where there are fewer than P.

    First outliers are left out, as long as P tracks remain, because k-means would give each a key point of its own:
    tracks that move differently from their object, then those present for less than half as long as the longest. The P
    key points are ordered from left to right by their first position, since a model predicts them by their index.
    """
    present = (tracks != ABSENT).all(-1)
    tracks, present = tracks[present.any(1)].astype(np.float64), present[present.any(1)]
    if len(tracks) < num_points:
        return None
    filled = _extrapolate(tracks, present)
    chosen = np.arange(len(tracks))
    for rule in (_moves_with_object, _is_long):
        kept = chosen[rule(filled[chosen], present[chosen])]
        chosen = kept if len(kept) >= num_points else chosen
    tracks, filled = tracks[chosen], filled[chosen]
    flat = filled.reshape(len(filled), -1)
    nearest: list[int] = []
    for centre in _k_means(flat, num_points, np.random.default_rng(seed)):
        distance = ((flat - centre) ** 2).sum(-1)
        distance[nearest] = np.inf
        nearest.append(int(distance.argmin()))
    order = np.lexsort((filled[nearest, 0, 1], filled[nearest, 0, 0]))
    return tracks[np.array(nearest)[order]]


def _moves_with_object(filled: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Which tracks move like the median one. Outliers are tracks that stuck to the background or moved to another
    object.

    A track may depart by a quarter of the object's extent, or by four times the median departure, whichever is more.
    For all tracks depart when parts of the object move by themselves or the object comes nearer.
    """
    moved = filled - filled[:, :1]
    departure = np.linalg.norm(moved - np.median(moved, 0), axis=-1).max(1)
    extent = np.linalg.norm(np.ptp(filled[:, 0], axis=0))
    return np.asarray(departure <= max(extent / 4, 4 * np.median(departure)))


def _is_long(filled: np.ndarray, present: np.ndarray) -> np.ndarray:
    seen = present.sum(1)
    return np.asarray(seen >= seen.max() / 2)


def _extrapolate(tracks: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Tracks without gaps, used for distances only: an absent point moves like the average of the present points."""
    step = np.diff(tracks, axis=1)
    both = present[:, 1:] & present[:, :-1]
    moved = np.where(both[..., None], step, 0).sum(0) / np.maximum(both.sum(0), 1)[:, None]
    filled, known = tracks.copy(), present.copy()
    for k in range(1, tracks.shape[1]):
        fill = known[:, k - 1] & ~known[:, k]
        filled[fill, k] = filled[fill, k - 1] + moved[k - 1]
        known[fill, k] = True
    for k in range(tracks.shape[1] - 2, -1, -1):
        fill = known[:, k + 1] & ~known[:, k]
        filled[fill, k] = filled[fill, k + 1] - moved[k]
        known[fill, k] = True
    return filled


def _k_means(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Centres (count, d) of points (n, d): k-means++ seeding (Arthur and Vassilvitskii, 2007), then Lloyd's steps."""
    centres = points[[rng.integers(len(points))]]
    for _ in range(1, count):
        distance = _distances(points, centres).min(1)
        total = distance.sum()
        share = distance / total if total > 0 else np.full(len(points), 1 / len(points))
        centres = np.concatenate((centres, points[[rng.choice(len(points), p=share)]]))
    label = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        before, label = label, _distances(points, centres).argmin(1)
        if (before == label).all():
            break
        for c in np.unique(label):
            centres[c] = points[label == c].mean(0)
    return centres


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances (n, c). Centres are few, so memory is bounded by one difference at a time."""
    return np.stack([((points - centre) ** 2).sum(-1) for centre in centres], -1)
