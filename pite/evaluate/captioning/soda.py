"""SODA_c: the story of a video as a whole (Fujita et al., SODA: Story Oriented Dense Video Captioning Evaluation
Framework, ECCV 2020).

Predictions are matched one to one with references, in the order of time, so that the sum of IoU times METEOR over the
pairs is the largest possible. Precision is this sum per prediction, recall per reference, and the score their F-measure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pite.evaluate.captioning.answers import Caption

_TINY = 1e-8
"""Keeps the IoU of two intervals without length finite, as in the published evaluation."""


def ious(predicted: Sequence[Caption], references: Sequence[Caption]) -> np.ndarray:
    """(references, predictions) IoU of the intervals; 0 where they are disjoint or reversed."""
    p_start, p_end = (np.array([[getattr(c, name) for c in predicted]]) for name in ("start", "end"))
    r_start, r_end = (np.array([[getattr(c, name)] for c in references]) for name in ("start", "end"))
    overlap = np.maximum(0.0, np.minimum(p_end, r_end) - np.maximum(p_start, r_start))
    hull = np.maximum(p_end, r_end) - np.minimum(p_start, r_start)
    return overlap / (np.minimum(hull, p_end - p_start + r_end - r_start) + _TINY)


def best_sum(scores: np.ndarray) -> float:
    """The largest sum of (R, P) scores over pairs whose rows and columns both increase.

    The paper's recurrence S[i, j] = max(S[i-1, j], S[i, j-1], S[i-1, j-1] + score[i, j]), one row at a time.
    """
    best = np.zeros(scores.shape[1] + 1)
    for row in scores:
        best[1:] = np.maximum.accumulate(np.maximum(best[1:], best[:-1] + row))
    return float(best[-1])


def f_measure(scores: np.ndarray) -> float:
    """SODA's F-measure of (R, P) scores of captions in the order of time; 0 without captions."""
    return 2 * best_sum(scores) / sum(scores.shape) if scores.size else 0.0
