"""L1, motion and grounding against compute, with tiny models of several widths: `python -m bench.scaling --parts A B`.

Trains the three stages from the vicuna of each folder in `--parts`, on each number of videos in `--videos`, with each seed.
The features are those of the first folder's clip. Fewer videos are the first ones of more, and the held-out videos are the
same. The epochs are the recipe's, so fewer videos are fewer steps too. Compute is that of stage 2, counted as the dry run
counts it (4N per computed row, attention, vocabulary head). A wider vicuna: `python -m engine.tiny B --width 256`, which
keeps a clip that B has already. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import matplotlib
import torch

# Draw without a window.
matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.ablation import VARIANTS, World, train_and_measure
from bench.measure import environment
from dataloaders.cli import parse
from dataloaders.files import write_atomically
from engine.budget.costs import run_costs
from engine.tiny.models import read_manifest
from engine.tiny.shipped import PARTS
from engine.train import TrainConfig

SCORES = {"l1": "trajectory L1 (fraction of the frame)", "slope": "motion slope", "miou": "grounding mIoU"}


@dataclass(frozen=True)
class Point:
    """A finished run: hidden size, training videos, seed, FLOPs of stage 2, and the scores in `SCORES`."""

    width: int
    videos: int
    seed: int
    flops: float
    l1: float
    slope: float
    miou: float


def stage2_flops(world: World, vicuna: Path, extra: Sequence[str] = ()) -> float:
    """FLOPs of stage 2's training by count, with more flags of engine.train."""
    flags = ("--model", "tiny", "--llm", vicuna, *world.flags, *extra, "--stage", 2)
    (cost,) = run_costs(parse(TrainConfig, [str(flag) for flag in flags]))
    return cost.flops


def table(points: list[Point]) -> str:
    """Means over the seeds, a row for each width and number of videos."""
    rows = [f"{'d':>5}{'videos':>8}{'seeds':>7}{'stage-2 TFLOP':>15}" + "".join(f"{name:>9}" for name in SCORES)]
    for width, videos in sorted({(point.width, point.videos) for point in points}):
        those = [point for point in points if (point.width, point.videos) == (width, videos)]
        means = "".join(f"{mean(getattr(point, name) for point in those):9.4f}" for name in SCORES)
        rows.append(f"{width:5}{videos:8}{len(those):7}{those[0].flops / 1e12:15.2f}{means}")
    return "\n".join(rows)


def plot(points: list[Point], file: Path) -> None:
    """A panel for each score over stage 2's compute: a line for each width through its means, a dot for each run."""
    figure, panels = plt.subplots(1, len(SCORES), figsize=(4.2 * len(SCORES), 3.4))
    for panel, (name, title) in zip(panels, SCORES.items()):
        for index, width in enumerate(sorted({point.width for point in points})):
            those = [point for point in points if point.width == width]
            panel.plot([p.flops for p in those], [getattr(p, name) for p in those], "o", color=f"C{index}", alpha=0.4)
            flops = sorted({point.flops for point in those})
            means = [mean(getattr(p, name) for p in those if p.flops == each) for each in flops]
            panel.plot(flops, means, color=f"C{index}", label=f"d = {width}")
        panel.set(xscale="log", xlabel="FLOPs of stage 2 (counted)", title=title)
        panel.grid(alpha=0.25)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--parts", type=Path, nargs="+", default=[PARTS], help="folders of a tiny clip and vicuna")
    parser.add_argument("--videos", type=int, nargs="+", default=[1000, 3400], help="numbers of training videos")
    parser.add_argument("--evaluation", type=int, default=400, help="held-out videos")
    parser.add_argument("--frames", type=int, default=32, help="N, frames per video")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each")
    parser.add_argument("--train", default="", help="extra flags for engine.train, as one string")
    options = parser.parse_args(arguments)
    points = []
    flags = options.train.split()
    for videos in options.videos:
        world = World(options.output / f"data-{videos}", options.output / "store")
        world.make(options.parts[0] / "clip", videos, options.evaluation, options.frames, twins=0.0)
        for parts in options.parts:
            vicuna = parts / "vicuna"
            width = read_manifest(vicuna)["width"]
            flops = stage2_flops(world, vicuna, flags)
            output = options.output / f"d{width}-{videos}"
            for seed in range(options.seeds):
                scores = train_and_measure(world, output, vicuna, VARIANTS[0], seed, flags)
                points.append(Point(width, videos, seed, flops, **{name: scores[name] for name in SCORES}))
    record = {"environment": environment(torch.device("cpu")), "points": [asdict(point) for point in points]}
    write_atomically(options.output / "scaling.json", json.dumps(record, indent=1) + "\n")
    plot(points, options.output / "scaling.png")
    print(table(points))
    return 0


if __name__ == "__main__":
    sys.exit(main())
