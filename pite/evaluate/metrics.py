"""Metrics of temporal grounding and trajectories, and the bounds to compare a score with.

Intervals are pairs (start, end) as fractions of the video. All functions are pure; the other modules of `pite.evaluate`
read files and run models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dataloaders.records import ABSENT
from pite.evaluate.protocols import Protocol

Interval = tuple[float, float]
RECALL_THRESHOLDS = (0.3, 0.5, 0.7)
_ANSWERS: dict[Protocol, re.Pattern[str]] = {
    "published": re.compile(r"(\d{2}) (?:to|and) (\d{2})"),
    # No part of a longer number, of a decimal number or of a percentage.
    "strict": re.compile(r"(?<![\d.,])(\d{1,3}) (?:to|and) (\d{1,3})(?![\d%]|[.,]\d)", re.ASCII),
}


def parse_interval(answer: str, num_frames: int = 100, protocol: Protocol = "strict") -> Interval | None:
    """First `a to b` or `a and b` of an answer as fractions of the video; None if there is none.

    A frame's time is its index / N, the published convention.
    protocol  strict: whole indices of one to three digits; published: two digits, also out of a longer number, so
              `from 100 to 200` is read as 0 to 20
    """
    match = _ANSWERS[protocol].search(answer)
    return (int(match[1]) / num_frames, int(match[2]) / num_frames) if match else None


def interval_iou(predicted: Interval, true: Interval, protocol: Protocol = "strict") -> float:
    """Intersection over the hull of two intervals; 0 if they are disjoint or have no length.

    The published evaluation rounds to two decimals before it applies thresholds: 0.495 counts for R1@0.5.
    """
    hull = max(predicted[1], true[1]) - min(predicted[0], true[0])
    overlap = min(predicted[1], true[1]) - max(predicted[0], true[0])
    iou = overlap / hull if hull > 0 and overlap > 0 else 0.0
    return round(iou, 2) if protocol == "published" else iou


@dataclass(frozen=True)
class GroundingScores:
    """Percentages over `count` questions: mean IoU, and the share of questions with IoU >= threshold (R1)."""

    miou: float
    recall: dict[float, float]
    count: int

    def as_dict(self) -> dict[str, float]:
        """Scores under their field names: mIoU, R1@0.3, R1@0.5, R1@0.7."""
        return {"mIoU": self.miou} | {f"R1@{threshold}": share for threshold, share in self.recall.items()}


def grounding_scores(ious: Sequence[float]) -> GroundingScores:
    """Scores from one IoU per question. Raises ValueError if there is no question."""
    if not len(ious):
        raise ValueError("there is no grounding prediction to score")
    values = np.asarray(ious, dtype=np.float64)
    # An IoU that is a threshold may be a rounding error of float64 below it.
    recall = {threshold: float((values >= threshold - 1e-9).mean()) * 100 for threshold in RECALL_THRESHOLDS}
    return GroundingScores(float(values.mean()) * 100, recall, len(values))


def best_fixed_interval(
    true: Sequence[Interval], num_frames: int = 100, protocol: Protocol = "strict"
) -> tuple[Interval, float]:
    """The one interval that has the highest mean IoU (0..1) when it answers every question, and that mean.

    The search covers every pair of frame indices, so every answer that a model can give, and it uses the true
    intervals. It is the upper bound for a model that uses neither video nor question.
    """
    if not len(true):
        raise ValueError("there is no interval to compare with")
    starts, ends = (indices / num_frames for indices in np.triu_indices(num_frames))
    total = np.zeros(len(starts))
    for start, end in true:
        overlap = np.minimum(ends, end) - np.maximum(starts, start)
        hull = np.maximum(ends, end) - np.minimum(starts, start)
        iou = np.where((overlap > 0) & (hull > 0), overlap / np.where(hull > 0, hull, 1.0), 0.0)
        total += iou.round(2) if protocol == "published" else iou
    best = int(total.argmax())
    return (float(starts[best]), float(ends[best])), float(total[best]) / len(true)


def question_blind_bound(
    true: Iterable[Sequence[Interval]], num_frames: int = 100, protocol: Protocol = "strict"
) -> float:
    """Question-blind upper bound: mean IoU (0..1) over all questions when each video gets its own best interval.

    The search uses the true intervals, so no model that sees the video but ignores the question can score higher. Only
    a score above this bound shows that the model uses the question.
    true  the intervals of each video
    """
    totals = [
        (best_fixed_interval(intervals, num_frames, protocol)[1] * len(intervals), len(intervals)) for intervals in true
    ]
    count = sum(number for _, number in totals)
    if not count:
        raise ValueError("there is no interval to compare with")
    return sum(total for total, _ in totals) / count


def present(trajectory: np.ndarray) -> np.ndarray:
    """(..., 2) trajectories -> boolean mask of the same shape, True at both coordinates of present points."""
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
    """The (P, N, 2) constant closest in L1 to (M, P, N, 2) trajectories: the median of each slot's present values.

    A slot that is never present gets 0.5; it does not enter the error.
    """
    shown = np.where(present(true), true.astype(np.float64), np.nan)
    never = np.isnan(shown).all(0)
    return np.where(never, 0.5, np.nanmedian(np.where(never, 0.5, shown), axis=0))


def static_oracle_l1(true: np.ndarray) -> float:
    """Trajectory L1 of the static oracle on (M, P, N, 2): each point stays at its own best place, from the true tracks.

    It is the lower bound for a model that finds each object's place but not its motion.
    """
    shown = np.where(present(true), true.astype(np.float64), np.nan)
    never = np.isnan(shown).all(2, keepdims=True)
    still = np.nanmedian(np.where(never, 0.5, shown), axis=2, keepdims=True)
    return trajectory_l1(np.broadcast_to(still, true.shape), true)


@dataclass(frozen=True)
class TrajectoryScores:
    """Mean absolute error of predicted trajectories, and the bounds to compare it with.

    best_constant  error of one trajectory for every phrase, chosen with the true ones
    static_oracle  error when each phrase has its own points that do not move, chosen with the true ones
    """

    l1: float
    best_constant: float
    static_oracle: float


def trajectory_scores(predicted: np.ndarray, true: np.ndarray) -> TrajectoryScores:
    """Scores of (M, P, N, 2) trajectories. Raises ValueError as `trajectory_l1`."""
    return TrajectoryScores(trajectory_l1(predicted, true), best_constant_l1(true), static_oracle_l1(true))


def best_constant_l1(true: np.ndarray) -> float:
    """Trajectory L1 of the best constant predictor, fitted on the (M, P, N, 2) trajectories that it is scored on."""
    return trajectory_l1(np.broadcast_to(best_constant_trajectory(true), true.shape), true)


@dataclass(frozen=True)
class MotionScores:
    """How predicted points move from the first to the last frame in which the true ones are present.

    slope       of the least-squares line through 0 of predicted on true displacements: 0 for points that do not move, 1
                for the true motion
    directions  share of the moving points whose direction is right, of right, left, down and up; chance is a quarter
    points      points that are present in two frames and move between them
    """

    slope: float
    directions: float
    points: int


def motion_scores(predicted: np.ndarray, true: np.ndarray) -> MotionScores | None:
    """Motion of (M, P, N, 2) trajectories; None if no true point moves. Raises ValueError as `trajectory_l1`."""
    trajectory_l1(predicted, true)
    shown = present(true)[..., 0]
    ends = shown.argmax(-1), shown.shape[-1] - 1 - shown[..., ::-1].argmax(-1)
    moved = [_displacements(trajectory.astype(np.float64), *ends) for trajectory in (predicted, true)]
    moves = moved[1].any(-1)
    if not moves.any():
        return None
    found, wanted = moved[0][moves], moved[1][moves]
    right = _direction(found) == _direction(wanted)
    return MotionScores(float((found * wanted).sum() / (wanted**2).sum()), float(right.mean()), len(wanted))


def _displacements(trajectory: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(M, P, 2) displacement of (M, P, N, 2) points between frames `first` and `last` (M, P)."""
    start, end = (np.take_along_axis(trajectory, at[..., None, None], axis=2)[:, :, 0] for at in (first, last))
    return np.asarray(end - start)


def _direction(displacements: np.ndarray) -> np.ndarray:
    """(n, 2) -> (n,) number of the direction, by the coordinate that changes most; -1 for none."""
    axis = np.abs(displacements).argmax(-1)
    along = np.take_along_axis(displacements, axis[:, None], axis=1)[:, 0]
    return np.where(along == 0, -1, 2 * axis + (along > 0))
