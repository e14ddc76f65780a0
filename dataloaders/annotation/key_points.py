"""Tracks to key points: k-means++ over whole trajectories (PiTe section 3.2), as the tracks nearest to the means.

The paper does not say whether a key point is a cluster's mean or a track of it. A mean jumps when a member is lost, so we
take a track, and every coordinate of a record is one that was measured.
"""

from __future__ import annotations

import numpy as np

from dataloaders.records import ABSENT

_ROUNDS = 50


def key_points(tracks: np.ndarray, num_points: int, seed: int = 0) -> np.ndarray | None:
    """M tracks (M, K, 2), (-1, -1) where absent, to P of them, (P, K, 2); None where there are fewer than P.

    Tracks that go another way than their object, and then those that are seen for less than half as long as the longest,
    are left out, as long as P others remain: k-means would give each stray one a key point of its own. The P stand from
    left to right by where they begin: a model predicts them by their place, so a place has to mean something.
    """
    present = (tracks != ABSENT).all(-1)
    tracks, present = tracks[present.any(1)].astype(np.float64), present[present.any(1)]
    if len(tracks) < num_points:
        return None
    whole = _carry_on(tracks, present)
    chosen = np.arange(len(tracks))
    for rule in (_together, _long_seen):
        kept = chosen[rule(whole[chosen], present[chosen])]
        chosen = kept if len(kept) >= num_points else chosen
    tracks, whole = tracks[chosen], whole[chosen]
    flat = whole.reshape(len(whole), -1)
    nearest: list[int] = []
    for centre in _k_means(flat, num_points, np.random.default_rng(seed)):
        distance = ((flat - centre) ** 2).sum(-1)
        distance[nearest] = np.inf
        nearest.append(int(distance.argmin()))
    order = np.lexsort((whole[nearest, 0, 1], whole[nearest, 0, 0]))
    return tracks[np.array(nearest)[order]]


def _together(whole: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Which tracks move as the median one, give or take: not those that the background kept or another thing took along.

    A track may depart by a quarter of the object's extent, or by four times the median departure, whichever is more: parts
    that move by themselves and an object that comes nearer make all tracks depart.
    """
    moved = whole - whole[:, :1]
    departure = np.linalg.norm(moved - np.median(moved, 0), axis=-1).max(1)
    extent = np.linalg.norm(np.ptp(whole[:, 0], axis=0))
    return np.asarray(departure <= max(extent / 4, 4 * np.median(departure)))


def _long_seen(whole: np.ndarray, present: np.ndarray) -> np.ndarray:
    seen = present.sum(1)
    return np.asarray(seen >= seen.max() / 2)


def _carry_on(tracks: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Tracks without gaps, for distances alone: an absent point moves as those that are seen move on average."""
    step = np.diff(tracks, axis=1)
    both = present[:, 1:] & present[:, :-1]
    moved = np.where(both[..., None], step, 0).sum(0) / np.maximum(both.sum(0), 1)[:, None]
    whole, known = tracks.copy(), present.copy()
    for k in range(1, tracks.shape[1]):
        fill = known[:, k - 1] & ~known[:, k]
        whole[fill, k] = whole[fill, k - 1] + moved[k - 1]
        known[fill, k] = True
    for k in range(tracks.shape[1] - 2, -1, -1):
        fill = known[:, k + 1] & ~known[:, k]
        whole[fill, k] = whole[fill, k + 1] - moved[k]
        known[fill, k] = True
    return whole


def _k_means(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Centres (count, d) of points (n, d): k-means++ seeding (Arthur and Vassilvitskii, 2007), then Lloyd's rounds."""
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
