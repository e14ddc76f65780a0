"""What the evaluation measures: temporal grounding and trajectories, with the bounds a score must be read against.

Intervals are pairs (start, end) as fractions of the video. All functions are pure; files and models live in
`pite.evaluate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dataloaders.records import ABSENT

Interval = tuple[float, float]
RECALL_THRESHOLDS = (0.3, 0.5, 0.7)
_ANSWER = re.compile(r"(\d{2}) (?:to|and) (\d{2})")


def parse_interval(answer: str, num_frames: int = 100) -> Interval | None:
    """First two-digit `a to b` or `a and b` of an answer as fractions of the video; None where there is none.

    Frame index / N stands for the time of the frame, the published convention.
    """
    match = _ANSWER.search(answer)
    return (int(match[1]) / num_frames, int(match[2]) / num_frames) if match else None


def interval_iou(predicted: Interval, true: Interval) -> float:
    """Intersection over the hull of two intervals, 0 where they miss each other or have no length, to two decimals.

    The published evaluation rounds before it thresholds: 0.495 counts for R1@0.5.
    """
    hull = max(predicted[1], true[1]) - min(predicted[0], true[0])
    overlap = min(predicted[1], true[1]) - max(predicted[0], true[0])
    return round(overlap / hull, 2) if hull > 0 and overlap > 0 else 0.0


@dataclass(frozen=True)
class GroundingScores:
    """Percentages over `count` questions: mean IoU and the share of questions with IoU >= threshold (R1)."""

    miou: float
    recall: dict[float, float]
    count: int

    def as_dict(self) -> dict[str, float]:
        """Scores under their field names: mIoU, R1@0.3, R1@0.5, R1@0.7."""
        return {"mIoU": self.miou} | {f"R1@{threshold}": share for threshold, share in self.recall.items()}


def grounding_scores(ious: Sequence[float]) -> GroundingScores:
    """Scores of one IoU per question. Raises ValueError where there is no question."""
    if not len(ious):
        raise ValueError("there is no grounding prediction to score")
    values = np.asarray(ious, dtype=np.float64)
    recall = {threshold: float((values >= threshold).mean()) * 100 for threshold in RECALL_THRESHOLDS}
    return GroundingScores(float(values.mean()) * 100, recall, len(values))


def best_fixed_interval(true: Sequence[Interval], num_frames: int = 100) -> tuple[Interval, float]:
    """The one answer that, given to every question, reaches the highest mean IoU (0..1), and that mean.

    Searched over every pair of frame indices, which is all a model can say. The answers are in hand, so no answer that
    looks at neither video nor question can do better.
    """
    if not len(true):
        raise ValueError("there is no interval to compare with")
    starts, ends = (indices / num_frames for indices in np.triu_indices(num_frames))
    total = np.zeros(len(starts))
    for start, end in true:
        overlap = np.minimum(ends, end) - np.maximum(starts, start)
        hull = np.maximum(ends, end) - np.minimum(starts, start)
        total += np.where((overlap > 0) & (hull > 0), overlap / np.where(hull > 0, hull, 1.0), 0.0).round(2)
    best = int(total.argmax())
    return (float(starts[best]), float(ends[best])), float(total[best]) / len(true)


def query_blind_bound(true: Iterable[Sequence[Interval]], num_frames: int = 100) -> float:
    """Mean IoU (0..1) over all questions when each video gets its own best single interval, answers in hand.

    No model that sees the video but ignores the question can do better, so a score means something only above it.
    true  the intervals of each video
    """
    totals = [(best_fixed_interval(intervals, num_frames)[1] * len(intervals), len(intervals)) for intervals in true]
    count = sum(number for _, number in totals)
    if not count:
        raise ValueError("there is no interval to compare with")
    return sum(total for total, _ in totals) / count


def present(trajectory: np.ndarray) -> np.ndarray:
    """(..., 2) trajectories -> boolean mask of the same shape, true at both coordinates of present points."""
    return np.broadcast_to((trajectory != ABSENT).any(-1, keepdims=True), trajectory.shape)


def trajectory_l1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean absolute error over the present coordinates of (M, P, N, 2) trajectories (PiTe eq. 8, `present`)."""
    if predicted.shape != true.shape:
        raise ValueError(f"predicted trajectories are {predicted.shape}, true ones {true.shape}")
    mask = present(true)
    if not mask.any():
        raise ValueError("no trajectory has a present point")
    return float(np.abs(predicted.astype(np.float64) - true)[mask].mean())


def best_constant_trajectory(true: np.ndarray) -> np.ndarray:
    """(P, N, 2) constant that is closest in L1 to (M, P, N, 2) trajectories: each slot's median over present ones.

    A slot that is never present gets 0.5; it carries no error either.
    """
    shown = np.where(present(true), true.astype(np.float64), np.nan)
    never = np.isnan(shown).all(0)
    return np.where(never, 0.5, np.nanmedian(np.where(never, 0.5, shown), axis=0))


def best_still_l1(true: np.ndarray) -> float:
    """Trajectory L1 of (M, P, N, 2) when each point keeps to its own best place throughout, answers in hand.

    What knows where each object is, but not how it moves, cannot do better.
    """
    shown = np.where(present(true), true.astype(np.float64), np.nan)
    never = np.isnan(shown).all(2, keepdims=True)
    still = np.nanmedian(np.where(never, 0.5, shown), axis=2, keepdims=True)
    return trajectory_l1(np.broadcast_to(still, true.shape), true)


@dataclass(frozen=True)
class TrajectoryScores:
    """Mean absolute error of predicted trajectories, and the bounds to read it against.

    best_constant  one trajectory given to every phrase, the best in hindsight
    best_still     each phrase's own points where they are best when they may not move, in hindsight: knows where, not when
    """

    l1: float
    best_constant: float
    best_still: float


def trajectory_scores(predicted: np.ndarray, true: np.ndarray) -> TrajectoryScores:
    """Scores of (M, P, N, 2) trajectories. Raises ValueError as `trajectory_l1`."""
    return TrajectoryScores(trajectory_l1(predicted, true), best_constant_l1(true), best_still_l1(true))


def best_constant_l1(true: np.ndarray) -> float:
    """Trajectory L1 of the best constant predictor, fitted on the very (M, P, N, 2) trajectories it is scored on."""
    return trajectory_l1(np.broadcast_to(best_constant_trajectory(true), true.shape), true)
