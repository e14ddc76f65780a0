"""The paper's Table 5 in miniature: `python -m bench.ablation --output runs/ablation --seeds 3`.

Trains the three stages on the synthetic world once per variant and seed, and prints the scores on held-out videos: mean
and spread over the seeds, and the differences from the first variant with the same seed. curves.png has stage 2's losses.
Every variant uses the same world and starts from the same tiny models; a seed changes the order of the data and the new
weights. Finished runs are not repeated, so seeds can be added later.

A share of the videos shows two equal things that differ in their motion alone ("twins"); questions about these are
scored apart. The tiny models of the package were pre-trained with trajectories, so from them "no trajectory stage" is not
without trajectories. `python -m engine.tiny PARTS --no-motion` makes models for `--parts PARTS` that were not.

Two variants are not in the paper and test the engine's arithmetic: `--only bfloat16 fp8`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np

# Draw without a window.
matplotlib.use("Agg")
from matplotlib import pyplot as plt

from dataloaders.files import sha256, write_atomically
from dataloaders.store.features import FeatureStore
from engine.demo.held_out import measure_grounding, measure_trajectories
from engine.plots import read_curves, smooth
from engine.tiny.shipped import PARTS
from pite.evaluate.grounding import Truth, read_answers, read_truth
from pite.generate import Generator


@dataclass(frozen=True)
class Variant:
    """A row of the table: extra flags for engine.train. With `after_stage1` it reuses the first stage of `PiTe`."""

    name: str
    flags: tuple[str, ...] = ()
    after_stage1: bool = True

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


VARIANTS = (
    Variant("PiTe"),
    Variant("no head initialisation", ("--no-head-init",)),
    Variant("no trajectory stage", ("--no-trajectory-stage",)),
    Variant("P = 1", ("--num-points", "1"), after_stage1=False),
    Variant("P = 5", ("--num-points", "5"), after_stage1=False),
    Variant("absent regressed", ("--absent", "regress"), after_stage1=False),
    Variant("lambda 0", ("--trajectory-weight", "0"), after_stage1=False),
    Variant("lambda 1", ("--trajectory-weight", "1"), after_stage1=False),
    Variant("no smoothing", ("--label-smoothing", "0"), after_stage1=False),
    Variant("bfloat16", ("--dtype", "bfloat16"), after_stage1=False),
    Variant("fp8", ("--dtype", "bfloat16", "--frozen-dtype", "fp8"), after_stage1=False),
)
CURVES = {"ce": "stage-2 CE", "l1": "stage-2 L1"}
COLUMNS = {
    "ce": "stage-2 CE, at end",
    "l1": "trajectory L1",
    "l1_constant": "best constant",
    "slope": "motion slope",
    "miou": "grounding mIoU",
    "blind": "question-blind",
    "twins": "twins' mIoU",
    "twins_blind": "their bound",
}
COMPARED = ("l1", "slope", "miou", "twins")
"""Columns whose differences from the first variant are printed."""

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t for 1 to 9 degrees of freedom; for more the last one, which gives a wider interval."""


def run(module: str, *arguments: object) -> None:
    """Run `python -m module`. Raises SystemExit with its exit status if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise SystemExit(f"bench.ablation: {' '.join(command[1:])} ended with status {status}")


@dataclass(frozen=True)
class World:
    """Folders of a synthetic world and of its videos' features."""

    data: Path
    store: Path

    @property
    def flags(self) -> tuple[object, ...]:
        return "--data", self.data, "--store", self.store

    def make(self, clip: Path, videos: int, evaluation: int, frames: int, twins: float) -> None:
        """Make the videos and encode them, as the demo does; what is there already is kept."""
        sizes = ("--videos", videos, "--evaluation", evaluation, "--frames", frames, "--twins", twins)
        run("dataloaders.synthetic", self.data, *sizes)
        run("engine.encode", *self.flags, "--clip", clip, "--num-frames", frames)


def train_and_measure(
    world: World, output: Path, vicuna: Path, variant: Variant, seed: int, flags: Sequence[str]
) -> dict[str, float]:
    """The scores of one variant and seed; read from scores.json if it exists."""
    folder = output / variant.folder / str(seed)
    scores = folder / "scores.json"
    settings = {"vicuna": sha256(vicuna / "model.safetensors"), "train": list(flags)}
    if scores.exists():
        saved = json.loads(scores.read_text())
        if saved.get("settings") != settings:
            raise SystemExit(
                f"bench.ablation: {folder} was trained with other --parts or --train: give another --output"
            )
        return dict(saved["scores"])
    common = ("--model", "tiny", "--llm", vicuna, *world.flags, "--seed", seed, *flags, *variant.flags)
    skipped = "--no-trajectory-stage" in variant.flags
    if variant.after_stage1 and variant.flags:
        first = output / VARIANTS[0].folder / str(seed) / "stage1" / "final"
        if skipped:
            run("engine.train", *common, "--stage", 3, "--init", first, "--output", folder)
        else:
            run("engine.train", *common, "--stage", 2, "--init", first, "--output", folder)
            run("engine.train", *common, "--stage", 3, "--output", folder)
    else:
        run("engine.train", *common, "--stage", "all", "--output", folder)
    answers = folder / "grounding.jsonl"
    written = ("--predictions", answers, "--overwrite")
    run("pite.evaluate", "grounding", "--model", folder / "stage3" / "final", *world.flags, *written)
    found = measure(world, folder, answers, None if skipped else folder / "stage2" / "final")
    write_atomically(scores, json.dumps({"settings": settings, "scores": found}, indent=1) + "\n")
    return found


def measure(world: World, folder: Path, answers: Path, stage2: Path | None) -> dict[str, float]:
    evaluation = world.data / "evaluation"
    truth = read_truth(evaluation / "activitynet_captions.json")
    frames = Generator.from_pretrained(folder / "stage3" / "final").model.config.num_frames
    predictions = read_answers(answers, truth)
    every, _ = measure_grounding(predictions, truth, frames)
    found = {"miou": every.miou, "blind": every.question_blind}
    if about_twins := [each for each in predictions if each.video in twins(truth)]:
        scores, _ = measure_grounding(about_twins, truth, frames)
        found |= {"twins": scores.miou, "twins_blind": scores.question_blind}
    if stage2 is not None:
        features = FeatureStore(world.store / "videos").read
        tracks = evaluation / "pite_143k.jsonl"
        trajectories, motion = measure_trajectories(Generator.from_pretrained(stage2), tracks, features)
        losses = read_curves(stage2.parent / "metrics.jsonl")["ce"]
        last = losses[-max(1, len(losses) // 10) :]
        found |= {"l1": trajectories.l1, "l1_constant": trajectories.best_constant, "ce": float(last.mean())}
        found["slope"] = motion.slope
    return found


def training_hours(folder: Path) -> float:
    """Hours of the steps of a run's stages, without the stage 1 of another run that it starts from."""
    stages = (read_curves(file)["seconds"] for file in sorted(folder.glob("stage*/metrics.jsonl")))
    return float(sum(seconds.sum() for seconds in stages)) / 3600


def twins(truth: Truth) -> set[str]:
    """Videos of two equal things: their sentences differ in the motion alone."""
    things = {
        video: [sentence.partition(" moves ")[0] for sentence in events.sentences] for video, events in truth.items()
    }
    return {video for video, named in things.items() if len(set(named)) < len(named)}


def plot_curves(output: Path, variants: Sequence[Variant], seeds: int) -> None:
    """Write OUTPUT/curves.png: stage 2's losses over its steps, and their difference from the first variant, same seed.

    Curves are running means over a thirtieth of the steps: the mean over the seeds, with the range shaded.
    """
    trained = [v for v in variants if "--no-trajectory-stage" not in v.flags]
    figure, panels = plt.subplots(2, len(CURVES), figsize=(6 * len(CURVES), 6), sharex=True, height_ratios=(2, 1))
    for column, (name, title) in zip(panels.T, CURVES.items()):
        first = None
        for index, variant in enumerate(trained):
            files = [output / variant.folder / str(seed) / "stage2" / "metrics.jsonl" for seed in range(seeds)]
            runs = [read_curves(file) for file in files]
            curves = np.stack([smooth(run[name], max(1, len(run[name]) // 30)) for run in runs])
            first = curves if first is None else first
            for panel, values in zip(column, (curves, 100 * (curves / first - 1))):
                steps = runs[0]["step"]
                panel.plot(steps, values.mean(0), color=f"C{index}", label=variant.name)
                panel.fill_between(steps, values.min(0), values.max(0), color=f"C{index}", alpha=0.15, linewidth=0)
                panel.grid(alpha=0.25)
        column[0].set(title=title)
        column[1].set(ylabel=f"% from {trained[0].name}'s", xlabel="optimizer step")
    panels[0, -1].legend()
    figure.tight_layout()
    figure.savefig(output / "curves.png", dpi=110)
    plt.close(figure)


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and standard deviation of each column over the seeds; a dash where a variant has no value."""
    lines = ["variant                 seeds" + "".join(f"{title:>20}" for title in COLUMNS.values())]
    for name, seeds in results.items():
        cells = []
        for column in COLUMNS:
            values = [scores[column] for scores in seeds if column in scores]
            spread = f" +- {stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.4f}{spread}" if values else "-")
        lines.append(f"{name:<24}{len(seeds):5}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def differences(results: dict[str, list[dict[str, float]]]) -> str:
    """Each variant minus the first with the same seed: mean and 95% confidence interval (paired t) of each column."""
    (first, base), *others = results.items()
    lines = [f"minus {first:<18}{'pairs':>5}" + "".join(f"{COLUMNS[column]:>28}" for column in COMPARED)]
    for name, seeds in others:
        cells = []
        for column in COMPARED:
            pairs = [
                ours[column] - theirs[column]
                for ours, theirs in zip(seeds, base)
                if column in ours and column in theirs
            ]
            cells.append(_interval(pairs) if len(pairs) > 1 else "-")
        lines.append(f"{name:<24}{len(seeds):5}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def _interval(values: Sequence[float]) -> str:
    half = T_975[min(len(values) - 1, len(T_975)) - 1] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.4f} ({mean(values) - half:+.4f}, {mean(values) + half:+.4f})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=__doc__.partition("\n")[0])
    names: list[Any] = [variant.name for variant in VARIANTS]
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="VARIANT", help=", ".join(names))
    parser.add_argument("--videos", type=int, default=3400, help="training videos")
    parser.add_argument("--evaluation", type=int, default=400, help="held-out videos")
    parser.add_argument("--frames", type=int, default=32, help="N, frames per video")
    parser.add_argument("--twins", type=float, default=0.3, help="share of videos with two equal things")
    parser.add_argument(
        "--parts", type=Path, default=PARTS, help="folder of the tiny clip and vicuna; those in the package"
    )
    parser.add_argument("--train", default="", help="extra flags for engine.train, as one string")
    options = parser.parse_args(arguments)
    for part in ("clip", "vicuna"):
        if not (options.parts / part).is_dir():
            parser.error(f"--parts {options.parts}: it holds no {part}: python -m engine.tiny {options.parts}")
    world = World(options.output / "data", options.output / "store")
    world.make(options.parts / "clip", options.videos, options.evaluation, options.frames, options.twins)
    # The first variant always runs, and runs first: others start from its stage 1.
    chosen = [v for v in VARIANTS if v.name in options.only or v is VARIANTS[0]]
    results: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in chosen}
    for seed in range(options.seeds):
        for variant in chosen:
            vicuna, flags = options.parts / "vicuna", options.train.split()
            scores = train_and_measure(world, options.output, vicuna, variant, seed, flags)
            results[variant.name].append(scores)
    hours = sum(training_hours(options.output / v.folder / str(seed)) for v in chosen for seed in range(options.seeds))
    text = f"{table(results)}\n\n{differences(results)}\n\n{hours:.1f} hours of training"
    write_atomically(options.output / "table.txt", text + "\n")
    plot_curves(options.output, chosen, options.seeds)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
