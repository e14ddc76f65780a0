"""Loss curves of one or more stages as one PNG: `python -m engine.plots RUN/stage1 RUN/stage2 --output curves.png`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataloaders import logs, paths
from dataloaders.cli import flag, parse, run
from dataloaders.logs import LogFlags
from engine.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (
    ("loss", "loss"),
    ("ce", "cross-entropy per token"),
    ("l1", "L1 per coordinate"),
    ("tokens_per_second", "sample tokens / s"),
)
WIDTH, HEIGHT = 4.6, 2.3
"""Of one plot, in inches."""
LEFT, RIGHT, TITLE, XLABEL, GAP = 0.8, 0.15, 0.35, 0.5, 0.2
"""Margins around all plots in inches, and the gap between two as a share of a plot."""


def read_curves(path: Path) -> dict[str, np.ndarray]:
    """metrics.jsonl -> one float64 array per numeric field, NaN where a line lacks it, in order of step.

    A step logged again after a resume replaces the earlier line. Raises ValueError naming file and line.
    """
    lines: dict[int, dict[str, float]] = {}
    for record in read_metrics(path, strict=True):
        lines[int(record["step"])] = {name: value for name, value in record.items() if isinstance(value, int | float)}
    if not lines:
        raise ValueError(f"{path}: holds no step")
    rows = [lines[step] for step in sorted(lines)]
    names = sorted({name for row in rows for name in row})
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64) for name in names}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` steps. NaNs are left out; the window is narrower at both ends."""
    known = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)


def plot_losses(stages: dict[str, Path], output: Path) -> None:
    """Write a PNG with one column per stage and one row per curve: raw values pale, their running mean strong.

    Losses of held-out samples are drawn as dots.

    stages  title -> metrics.jsonl with the fields step, loss, ce, l1, tokens_per_second
    """
    # Matplotlib is imported here, because training imports this module. Without pyplot it needs no display.
    from matplotlib.figure import Figure

    metrics = {title: read_curves(path) for title, path in stages.items()}
    curves = [curve for curve in CURVES if any(np.isfinite(m.get(curve[0], np.nan)).any() for m in metrics.values())]
    if not curves:
        raise ValueError(f"none of {', '.join(map(str, stages.values()))} holds a loss")
    width, height = WIDTH * len(metrics), HEIGHT * len(curves) + TITLE + XLABEL
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(curves), len(metrics), squeeze=False, sharex="col")
    # The margins are known, so no layout has to be found by drawing everything once more.
    figure.subplots_adjust(LEFT / width, XLABEL / height, 1 - RIGHT / width, 1 - TITLE / height, GAP, GAP)
    for column, (title, values) in enumerate(metrics.items()):
        axes[0, column].set_title(title, fontsize=11, fontweight="bold")
        axes[-1, column].set_xlabel("optimizer step")
        for row, (name, label) in enumerate(curves):
            axes[row, 0].set_ylabel(label)
            held_out = values.get(f"validation_{name}")
            _draw(axes[row, column], values["step"], values.get(name), held_out, f"C{row}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130, format="png")


def _draw(axes: Axes, steps: np.ndarray, values: np.ndarray | None, held_out: np.ndarray | None, color: str) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # A stage without the loss logs zeros.
    if values is None or not np.nan_to_num(values).any():
        axes.text(0.5, 0.5, "none in this stage", transform=axes.transAxes, ha="center", color="0.5")
        axes.set_yticks([])
        return
    mean = smooth(values, max(len(values) // 30, 1))
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    axes.plot(steps, mean, color=color, linewidth=1.8)
    if held_out is not None and (known := np.isfinite(held_out)).any():
        axes.plot(steps[known], held_out[known], "o--", color="0.25", linewidth=1, markersize=3, label="validation")
        axes.legend(loc="lower left", frameon=False, fontsize=8)
    axes.annotate(f"{mean[np.isfinite(mean)][-1]:.4g}", (1, 0.94), xycoords="axes fraction", ha="right", color=color)


@dataclass(frozen=True, kw_only=True)
class PlotFlags(LogFlags):
    """Draw the loss curves of one or more stages as one PNG."""

    stages: tuple[Path, ...] = flag(positional=True)
    """stage outputs, or their metrics.jsonl"""
    output: Path = Path("losses.png")
    """the picture"""

    def __post_init__(self) -> None:
        if self.output.suffix.lower() != ".png":
            raise ValueError(f"--output {self.output}: a PNG is written, so give a name that ends in .png")

    @property
    def metrics(self) -> list[Path]:
        """The metrics.jsonl of each stage."""
        return [path / "metrics.jsonl" if path.is_dir() else path for path in self.stages]

    def check_paths(self) -> None:
        """Raise ValueError for metrics that do not exist, and a picture that cannot be written."""
        for path in self.metrics:
            paths.input_file("STAGES", path)
        paths.distinct_files({"--output": self.output}, {f"STAGES ({path})": path for path in self.metrics})
        paths.output_file("--output", self.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse(PlotFlags, argv, prog="python -m engine.plots")
    logs.configure(flags.log_level)

    def plot() -> None:
        flags.check_paths()
        plot_losses({path.parent.name: path for path in flags.metrics}, flags.output)
        print(flags.output)

    return run("engine.plots", plot)


if __name__ == "__main__":
    sys.exit(main())
