"""Scores as the printed text, and as numbers by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from pite.evaluate.grounding import Events, Prediction, ious
from pite.evaluate.metrics import (
    best_fixed_interval,
    grounding_scores,
    motion_scores,
    parse_interval,
    question_blind_bound,
    trajectory_scores,
)

log = logging.getLogger(__name__)

EXAMPLE = 80
"""Most characters of an answer that is quoted."""

Report = tuple[str, dict[str, str | float]]
"""The printed text, and its numbers by name."""


def grounding_report(predictions: Sequence[Prediction], truth: Mapping[str, Events], num_frames: int) -> Report:
    """Scores of answers whose frame indices count `num_frames` frames per video, and the bounds to compare them with."""
    without = [each.answer for each in predictions if parse_interval(each.answer, num_frames) is None]
    scores = grounding_scores(ious(predictions, truth, num_frames))
    answered = {prediction.video for prediction in predictions}
    intervals = [truth[video].intervals for video in truth if video in answered]
    fixed = best_fixed_interval([interval for those in intervals for interval in those], num_frames)[1] * 100
    blind = question_blind_bound(intervals, num_frames) * 100
    lines = [f"{name:<8} {value:6.2f}" for name, value in scores.as_dict().items()]
    lines.append(f"mIoU of the best fixed interval {fixed:.2f}")
    lines.append(f"mIoU of the question-blind upper bound (best interval per video) {blind:.2f}")
    lines.append(f"over {scores.count} answers; the ground truth has {num_events(truth)} events")
    if without:
        lines.append(_without_interval(without, len(predictions)))
    bounds = {"mIoU of the best fixed interval": fixed, "mIoU of the best interval per video": blind}
    counts = {"answers": scores.count, "answers without an interval": len(without)}
    return "\n".join(lines), {"task": "grounding", **scores.as_dict(), **bounds, **counts}


def _without_interval(answers: Sequence[str], total: int) -> str:
    """The line about answers that count as IoU 0 because they name no interval; a warning too, if all are such."""
    example = " ".join(answers[0].split())
    example = example if len(example) <= EXAMPLE else f"{example[: EXAMPLE - 3]}..."
    line = f"{len(answers):,} of {total:,} answers name no interval, such as {example!r}"
    if len(answers) == total:
        log.warning("%s: every score is 0", line)
    return line


def num_events(truth: Mapping[str, Events]) -> int:
    return sum(len(events.sentences) for events in truth.values())


def trajectory_report(predicted: np.ndarray, true: np.ndarray, answers: int) -> Report:
    """Scores of trajectories (M, P, N, 2), of the tokens of `answers` answers."""
    scores, motion = trajectory_scores(predicted, true), motion_scores(predicted, true)
    report = (
        f"L1            {scores.l1:.4f}\n"
        f"best constant {scores.best_constant:.4f}\n"
        f"static oracle {scores.static_oracle:.4f}\n"
        f"motion slope  {motion.slope:.4f}   predicted over true displacement of {motion.points} points\n"
        f"directions    {motion.directions:.4f}   share that is right, of four\n"
        f"over {len(true)} tokens of {answers} answers"
    )
    numbers = {"L1": scores.l1, "constant": scores.best_constant, "unmoved": scores.static_oracle, "tokens": len(true)}
    numbers |= {"motion slope": motion.slope, "motion directions": motion.directions}
    return report, {"task": "trajectories", **numbers}
