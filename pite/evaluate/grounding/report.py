"""Scores of temporal grounding as text and numbers, with bounds to compare them with and counts of odd answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pite.evaluate.grounding.answers import NUM_FRAMES, ious
from pite.evaluate.grounding.truth import Truth, num_events, outside, without_length
from pite.evaluate.metrics import best_fixed_interval, grounding_scores, parse_interval, question_blind_bound
from pite.evaluate.predictions import Prediction
from pite.evaluate.protocols import Protocol
from pite.evaluate.reports import Report, quoted

log = logging.getLogger(__name__)


def report(
    predictions: Sequence[Prediction],
    truth: Truth,
    *,
    protocol: Protocol = "strict",
    num_frames: int = NUM_FRAMES,
) -> Report:
    """Scores of answers whose frame indices count `num_frames` frames per video, and the bounds to compare them with.

    Raises ValueError if there is no prediction.
    """
    scores = grounding_scores(ious(predictions, truth, num_frames, protocol))
    answered = {prediction.video for prediction in predictions}
    intervals = [truth[video].intervals for video in truth if video in answered]
    every = [interval for those in intervals for interval in those]
    fixed = best_fixed_interval(every, num_frames, protocol)[1] * 100
    blind = question_blind_bound(intervals, num_frames, protocol) * 100
    lines = [f"{name:<8} {value:6.2f}" for name, value in scores.as_dict().items()]
    lines.append(f"mIoU of the best fixed interval {fixed:.2f}")
    lines.append(f"mIoU of the question-blind upper bound (best interval per video) {blind:.2f}")
    lines.append(f"over {scores.count} answers; the ground truth has {num_events(truth)} events")
    odd_answers, answer_counts = _odd_answers(predictions, num_frames, protocol)
    odd_events, event_counts = _odd_events(truth)
    bounds = {"mIoU of the best fixed interval": fixed, "mIoU of the best interval per video": blind}
    counts = {"answers": scores.count, **answer_counts, "events": num_events(truth), **event_counts}
    text = "\n".join([*lines, *odd_answers, *odd_events])
    return Report("grounding", text, {**scores.as_dict(), **bounds, **counts, "protocol": protocol})


def _odd_answers(
    predictions: Sequence[Prediction], num_frames: int, protocol: Protocol
) -> tuple[list[str], dict[str, int]]:
    """A line for each kind of answer that a wrong prompt or model gives, and the number of each."""
    kinds: dict[str, list[str]] = {"no interval": [], "past the end": [], "reversed": []}
    for answer in (prediction.answer for prediction in predictions):
        interval = parse_interval(answer, num_frames, protocol)
        if interval is None:
            kinds["no interval"].append(answer)
            continue
        if round(max(interval) * num_frames) >= num_frames:
            kinds["past the end"].append(answer)
        if interval[0] > interval[1]:
            kinds["reversed"].append(answer)
    total = f"{len(predictions):,}"
    names = {
        "no interval": "name no interval",
        "past the end": f"name a frame past the last one, {num_frames - 1}",
        "reversed": "name a reversed interval",
    }
    lines = [
        f"{len(those):,} of {total} answers {names[kind]}, such as {quoted(those[0])}"
        for kind, those in kinds.items()
        if those
    ]
    if len(kinds["no interval"]) == len(predictions):
        log.warning("%s: every score is 0", lines[0])
    keys = ("answers without an interval", "answers past the end", "answers reversed")
    return lines, dict(zip(keys, map(len, kinds.values())))


def _odd_events(truth: Truth) -> tuple[list[str], dict[str, int]]:
    """A line for each kind of event that no answer can match in full, and the number of each."""
    empty, beyond = list(without_length(truth)), list(outside(truth))
    lines = []
    if empty:
        lines.append(
            f"{len(empty):,} events of the ground truth are reversed or empty, so each answer to them scores 0, such as "
            f"{empty[0]}"
        )
    if beyond:
        lines.append(f"{len(beyond):,} events of the ground truth are not within their video, such as {beyond[0]}")
    return lines, {"events reversed or empty": len(empty), "events outside the video": len(beyond)}
