"""Plots of temporal grounding as PNG: how the IoUs are distributed, and intervals on a time line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dataloaders.files import file_written_atomically
from pite.evaluate.grounding import Truth
from pite.evaluate.metrics import RECALL_THRESHOLDS, interval_iou, parse_interval
from pite.evaluate.predictions import Prediction
from pite.evaluate.protocols import Protocol

BINS = 20
MOST_EVENTS = 40
"""Events on a time line. More could not be read."""

MOST_LETTERS = 48
_TRUE, _PREDICTED = "#1f77b4", "#ff7f0e"


def draw_histogram(path: Path, ious: Sequence[float]) -> None:
    """Write a histogram of IoUs (0..1) with the mean and the thresholds of R1."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(ious, bins=np.linspace(0, 1, BINS + 1).tolist(), color=_TRUE)
    axes.axvline(float(np.mean(ious)), color=_PREDICTED, label=f"mean {np.mean(ious):.3f}")
    for threshold in RECALL_THRESHOLDS:
        share = float(np.mean(np.asarray(ious) >= threshold))
        axes.axvline(threshold, color="grey", linestyle=":", label=f"R1@{threshold} {share:.3f}")
    axes.set(xlabel="IoU", ylabel="answers", xlim=(0, 1), title=f"IoU of {len(ious):,} answers")
    axes.legend()
    _save(figure, path)


def draw_timeline(
    path: Path, predictions: Sequence[Prediction], truth: Truth, num_frames: int, protocol: Protocol = "strict"
) -> None:
    """Write the true and the predicted interval of each of the first MOST_EVENTS answers, as bars over the video."""
    shown = predictions[:MOST_EVENTS]
    figure = Figure(figsize=(10, 1.2 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for row, prediction in enumerate(shown):
        events, sentence = truth[prediction.video], prediction.info["sentence_id"]
        true, predicted = events.intervals[sentence], parse_interval(prediction.answer, num_frames, protocol)
        axes.barh(row - 0.2, true[1] - true[0], 0.36, true[0], color=_TRUE, label=None if row else "true")
        iou = 0.0
        if predicted is not None:
            iou = interval_iou(predicted, true, protocol)
            length = predicted[1] - predicted[0]
            axes.barh(row + 0.2, length, 0.36, predicted[0], color=_PREDICTED, label=None if row else "predicted")
        axes.text(1.01, row, f"{iou:.2f}" if predicted is not None else "none", va="center", fontsize=8)
        labels.append(_shortened(f"{prediction.video}: {events.sentences[sentence]}"))
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set(xlabel="share of the video; the number is the IoU", xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6))
    title = f"the first {len(shown)} of {len(predictions):,} answers" if len(shown) < len(predictions) else None
    axes.set_title(title or f"{len(shown):,} answers", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    _save(figure, path)


def _shortened(text: str) -> str:
    # A dollar sign would begin a formula.
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}..."


def _save(figure: Figure, path: Path) -> None:
    with file_written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
