"""The way of an object through the candidates of all frames, by dynamic programming over the whole event.

A frame in which the object is hidden has no place on the way, at a cost, and the way may end at any frame, so an object
that leaves the picture is absent instead of being mixed up with the next best thing. Nothing is decided before the last
frame was seen, which is what an online tracker cannot do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataloaders.annotation.appearance import Candidates

_ENOUGH = 0.35
"""Score at which a place is worth as much as no place."""
_HIDDEN = (3.0, 0.3)
"""Cost of a gap, and of each frame of it."""
_LONGEST = 20
"""Frames of the longest gap."""
_FREE, _PER_FRAME = 0.2, 0.05
"""Deviation from the expected place: as a share of the object's size, and of it per frame of the step."""
_RESIZED = 0.1
"""Cost of each step between two of `SCALES`; one in four frames of a gap is free."""
_NEWEST = 0.3
"""Share of the newest step in the motion of a way."""
_FAR = (0.35, 0.05)
"""Deviation that no step may exceed, as a share of the object's size, and of it per frame of the step."""


def link(candidates: Sequence[Candidates], size: np.ndarray, frame: np.ndarray) -> dict[int, int]:
    """The best way: for each frame in which the object is seen, the index of its candidate. The first frame has one.

    size   (2,) width and height of the object in the first frame, in the candidates' pixels
    frame  (2,) width and height of the frames. What moves out of them in a gap does not come back
    """
    scale = float(size.mean())
    total = [candidates[0].scores - _ENOUGH]
    origin = [np.full((1, 2), -1)]
    motion = [candidates[0].velocities]
    for t, here in enumerate(candidates[1:], 1):
        best = np.full(len(here.scores), -np.inf)
        before = np.full((len(here.scores), 2), -1)
        moving = here.velocities.copy()
        for gap in range(1, min(_LONGEST, t) + 1):
            there = candidates[t - gap]
            if not len(there.scores) or not len(here.scores):
                continue
            value = total[t - gap][None] - _cost(there, here, gap, scale, frame, motion[t - gap])
            chosen = value.argmax(1)
            reached = value[np.arange(len(chosen)), chosen]
            better = reached > best
            best[better] = reached[better]
            before[better] = np.stack((np.full(len(chosen), t - gap), chosen), -1)[better]
            step = (here.centres - there.centres[chosen]) / gap
            share = 1.0 if t == gap else _NEWEST
            moving[better] = (share * step + (1 - share) * motion[t - gap][chosen])[better]
        total.append(best + here.scores - _ENOUGH)
        origin.append(before)
        motion.append(moving)
    return _way(total, origin)


def _cost(
    there: Candidates, here: Candidates, gap: int, scale: float, frame: np.ndarray, motion: np.ndarray
) -> np.ndarray:
    """Cost (n, m) of a step of `gap` frames from each of m candidates to each of n.

    motion  (m, 2) pixels per frame on the way to each of the m. It bridges a gap, because the flow next to what hides
            the object is that of the latter
    """
    velocity = here.velocities[:, None] if gap == 1 else motion[None]
    off = here.centres[:, None] - there.centres[None] - gap * velocity
    squares = (off**2).sum(-1) / scale**2
    resized = np.abs(here.sizes[:, None] - there.sizes[None])
    cost = np.sqrt(1 + squares / (_FREE + _PER_FRAME * gap) ** 2) - 1
    cost += _RESIZED * np.maximum(0, resized - (gap - 1) / 4)
    cost[squares > (_FAR[0] + _FAR[1] * gap) ** 2] = np.inf
    if gap > 1:
        ahead = there.centres + gap * motion
        cost[:, ((ahead < 0) | (ahead > frame)).any(1)] = np.inf
        cost += _HIDDEN[0] + _HIDDEN[1] * (gap - 1)
    return cost


def _way(total: Sequence[np.ndarray], origin: Sequence[np.ndarray]) -> dict[int, int]:
    ends = [(float(values.max()), t, int(values.argmax())) for t, values in enumerate(total) if len(values)]
    _, t, chosen = max(ends)
    way = {}
    while t >= 0:
        way[t] = chosen
        t, chosen = (int(each) for each in origin[t][chosen])
    return way
