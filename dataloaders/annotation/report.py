"""What became of the phrases of a run: how many have a trajectory, for how long it is present, and how far it goes.

A set whose trajectories are only those of things that stand still teaches where things are, not how they move. The
table shows it: few lost phrases, but small distances.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from dataloaders.records import ABSENT

STILL = 0.02
"""Share of the frame's width or height below which a thing counts as still."""

_ROWS = 12
"""Most phrases of the table."""


@dataclass(frozen=True)
class Measured:
    """How a phrase's key points were followed.

    present  share of the points and moments that are present
    moved    largest distance of a point from its first place, as a fraction of the frame, averaged over the points
    lost     present in too few moments to be written
    """

    phrase: str
    present: float
    moved: float
    lost: bool


def measure(phrase: str, points: np.ndarray, lost: float) -> Measured:
    """Measure key points (P, K, 2), (-1, -1) where absent; below the share `lost` of present ones they are lost."""
    here = (points != ABSENT).all(-1)
    paths = [point[seen] for point, seen in zip(points, here) if seen.any()]
    moved = [float(np.linalg.norm(path - path[0], axis=-1).max()) for path in paths]
    present = float(here.mean())
    return Measured(phrase, round(present, 4), round(float(np.mean(moved)) if moved else 0.0, 4), present < lost)


def summary(counts: Sequence[dict[str, int]], lost: float) -> str:
    """One sentence of the counts of all records."""
    total = sum((Counter(each) for each in counts), Counter[str]())
    return (
        f"{len(counts):,} videos, {total['events']:,} events, {total['phrases']:,} phrases; {total['found']:,} of them "
        f"found in their event's first frame, {total['followed']:,} tracked, {total['trajectories']:,} with a "
        f"trajectory, {total['lost']:,} lost (present in less than {lost:.0%} of the moments)"
    )


def table(measured: Sequence[Measured]) -> str:
    """The trajectories of the whole set, then of its most frequent phrases. Empty where there is none."""
    if not measured:
        return "no phrase has a trajectory"
    phrases: dict[str, list[Measured]] = defaultdict(list)
    for each in measured:
        phrases[each.phrase.lower()].append(each)
    frequent = sorted(phrases.items(), key=lambda item: (-len(item[1]), item[0]))[:_ROWS]
    rows = [_row("all phrases", measured), *(_row(phrase, found) for phrase, found in frequent)]
    head = f"{'phrase':32} {'number':>8} {'lost':>6} {'present':>8} {'moved':>6} {'still':>6}"
    explained = "present: median share of the moments; moved: median distance, in frames"
    return "\n".join([head, *rows, f"{explained}; still: share that moved less than {STILL:g}"])


def _row(name: str, found: Sequence[Measured]) -> str:
    kept = [each for each in found if not each.lost]
    shown = name if len(name) <= 32 else f"{name[:29]}..."
    row = f"{shown:32} {len(found):8,} {1 - len(kept) / len(found):6.0%}"
    if not kept:
        return f"{row} {'-':>8} {'-':>6} {'-':>6}"
    still = sum(each.moved < STILL for each in kept) / len(kept)
    return f"{row} {median(e.present for e in kept):8.0%} {median(e.moved for e in kept):6.3f} {still:6.0%}"
