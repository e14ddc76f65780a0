"""End-to-end demo: `python -m engine.demo --output runs/demo`.

World -> features -> stages 1, 2, 3 -> evaluation -> chat. Each step is a command that a real run uses too, so any
printed line can be copied. A finished step is not run again; a stopped one continues. At the end the demo prints one
table, and saves the loss curves and a held-out video with its predicted and true trajectories.

As a real run does, the demo starts from a pre-trained CLIP and language model: tiny ones that come with the package.
The tiny language model was taught to read motion from noisy exact logs of scenes, and the stages carry that over to
pixels. Vicuna brings no such ability, so the demo's figures on motion do not show what PiTe learns from Vicuna.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders import cli, logs, paths
from dataloaders.cli import at_least
from dataloaders.files import directory_written_atomically, sha256, write_atomically
from dataloaders.logs import LogFlags
from dataloaders.synthetic.language import TIMES_FIRST
from engine.demo.example import example_event
from engine.plots import plot_losses
from engine.tiny.config import TinyConfig
from engine.tiny.shipped import PARTS
from pite.evaluate.grounding import question_for

WEIGHTS = "model.safetensors"
"""A tiny model's file of weights."""


@dataclass(frozen=True)
class DemoConfig(LogFlags):
    """Make a synthetic world, train the three stages on it, and measure and draw the results."""

    output: Path = Path("runs/demo")
    """output folder; running the same command again makes what is missing"""
    videos: int = 3400
    """training videos"""
    evaluation: int = 400
    """held-out videos"""
    num_frames: int = 32
    """N, frames per video"""
    pretrain: bool = False
    """train the tiny CLIP and language model anew (65 minutes of CPU on an AMD EPYC, 40 on two cores) instead of starting from those in the package"""
    tiny: str = ""
    """with --pretrain: further flags for engine.tiny, as one string"""
    train: str = ""
    """further flags for engine.train, as one string"""
    seed: int = 0
    """seed of the world, the weights and the data order"""

    def __post_init__(self) -> None:
        at_least(self, 1, "videos", "evaluation")
        if not 2 <= self.num_frames <= 100:
            raise ValueError(f"--num-frames must be 2 to 100 (indices have two digits), not {self.num_frames}")
        if self.tiny and not self.pretrain:
            raise ValueError("--tiny holds flags of the pre-training: add --pretrain")
        if self.num_frames != TinyConfig.frames and not self.pretrain:
            raise ValueError(
                f"--num-frames {self.num_frames}: the language model in the package reads videos of "
                f"{TinyConfig.frames} frames; add --pretrain"
            )


@dataclass(frozen=True)
class Step:
    """A module with its arguments, run as a separate process; `product` exists once it has finished."""

    title: str
    module: str
    arguments: tuple[str, ...]
    product: Path

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", self.module, *self.arguments])


class StepFailed(ValueError):
    """A step ended with an error or was stopped early; the message names the step and its command."""


def steps(config: DemoConfig) -> Iterator[Step]:
    """The steps in order, lazily: the arguments of the last ones depend on a video that earlier steps make."""
    out, frames, seed = config.output, str(config.num_frames), str(config.seed)
    data, store, run = (str(out / name) for name in ("data", "store", "run"))
    models = str(out / "models")
    clip = ("--clip", f"{models}/clip")
    given = ("--data", data, "--store", store)

    sizes = ("--videos", str(config.videos), "--evaluation", str(config.evaluation))
    captions = out / "data" / "evaluation" / "activitynet_captions.json"
    yield Step("world", "dataloaders.synthetic", (data, *sizes, "--frames", frames, "--seed", seed), captions)

    if config.pretrain:
        flags = (models, "--frames", frames, "--seed", seed, *shlex.split(config.tiny))
        yield Step("pre-training", "engine.tiny", flags, out / "models" / "vicuna")

    manifest = out / "store" / "videos" / "manifest.json"
    yield Step("features", "engine.encode", (*given, *clip, "--num-frames", frames), manifest)

    training = ("--model", "tiny", "--llm", f"{models}/vicuna", *given, "--output", run, "--seed", seed)
    for stage in ("1", "2", "3"):
        flags = ("--stage", stage, *training, *shlex.split(config.train))
        yield Step(f"stage {stage}", "engine.train", flags, out / "run" / f"stage{stage}" / "final")

    final = ("--model", f"{run}/stage3/final")
    answers = out / "grounding.jsonl"
    # The folder may hold the answers of an earlier model.
    flags = ("grounding", *final, *given, "--predictions", str(answers), "--overwrite")
    yield Step("grounding", "pite.evaluate", flags, answers)

    name, sentence = example_event(captions)
    about = ("--video", str(captions.parent / "videos" / f"{name}.mp4"), *clip)
    yield Step("chat", "pite.chat", (*final, *about, "--query", question_for(sentence)), answers)

    # Stage 3 changes the hidden states but not the trajectory head, so stage 2's model predicts trajectories best.
    film = out / "chat.mp4"
    flags = ("--model", f"{run}/stage2/final", *about, "--query", TIMES_FIRST, "--trajectory", str(film))
    yield Step("chat, drawn", "pite.chat", flags, film)


def copy_parts(models: Path) -> None:
    """Copy the tiny models of the package to `models`. Raises ValueError if it holds others."""
    for name in ("clip", "vicuna"):
        part, copy = PARTS / name, models / name
        if not copy.exists():
            with directory_written_atomically(copy) as unfinished:
                shutil.copytree(part, unfinished, dirs_exist_ok=True)
        elif sha256(copy / WEIGHTS) != sha256(part / WEIGHTS):
            raise ValueError(
                f"{copy} is not the package's tiny model: remove {models.parent}, or give another --output"
            )


def run_steps(config: DemoConfig) -> tuple[dict[str, float], bool]:
    """Run the steps that are not done yet. Returns each step's seconds, and whether any ran. Raises StepFailed."""
    config.output.mkdir(parents=True, exist_ok=True)
    record = config.output / "steps.json"
    done: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.exists() else {}
    if not config.pretrain:
        copy_parts(config.output / "models")
    elif "features" in done and "pre-training" not in done:
        raise ValueError(
            f"{config.output} was made from the package's tiny models: give another --output with --pretrain"
        )
    seconds: dict[str, float] = {}
    ran = False
    for step in steps(config):
        if done.get(step.title, {}).get("command") == step.command and step.product.exists():
            print(f"done before  {step.command}", flush=True)
        else:
            print(f"\n$ {step.command}", flush=True)
            started = time.monotonic()
            status = subprocess.run([sys.executable, "-m", step.module, *step.arguments], check=False).returncode
            if status:
                raise StepFailed(f"step {step.title!r} ended with status {status}: {step.command}")
            if not step.product.exists():
                raise StepFailed(f"step {step.title!r} was stopped before it was done; the same command continues")
            done[step.title] = {"command": step.command, "seconds": round(time.monotonic() - started, 1)}
            write_atomically(record, json.dumps(done, indent=1) + "\n")
            ran = True
        seconds[step.title] = done[step.title]["seconds"]
    return seconds, ran


def table(summary: dict[str, Any]) -> str:
    """The table of results that the demo prints at the end."""
    lines = ["", "step           seconds"]
    lines += [f"{title:<14} {seconds:7.0f}" for title, seconds in summary["seconds"].items()]
    lines += [
        f"{'total':<14} {sum(summary['seconds'].values()):7.0f}",
        "",
        f"held out: {summary['held_out_videos']} videos, {summary['held_out_questions']} questions",
        f"trajectory L1         {summary['trajectory_l1']:.4f}   best constant {summary['trajectory_l1_best_constant']:.4f}"
        f"   static oracle {summary['trajectory_l1_static_oracle']:.4f}"
        f"   after stage 3 {summary['trajectory_l1_after_stage3']:.4f}",
        f"motion slope          {summary['motion_slope']:.3f}    directions {summary['motion_directions']:.3f}"
        "   (the tiny language model was pre-trained to read motion from exact logs; Vicuna is not)",
        f"captions              {summary['caption_all']:.3f}    colour {summary['caption_colour']:.3f}"
        f"   shape {summary['caption_shape']:.3f}   direction {summary['caption_direction']:.3f}"
        f"   indices {summary['caption_indices']:.3f}   {summary['caption_events']} events",
        f"grounding mIoU        {summary['grounding_miou']:.3f}"
        f"    question-blind {summary['grounding_miou_query_blind']:.3f}"
        f"   best fixed interval {summary['grounding_miou_best_fixed']:.3f}",
    ]
    dense = {name: summary.get(f"captioning_{name}") for name in ("soda_c", "METEOR", "CIDEr")}
    if None not in dense.values():
        lines.append(f"dense captioning      {'   '.join(f'{name} {value:.2f}' for name, value in dense.items())}")
    blind, counts = summary["grounding_miou_query_blind_by_objects"], summary["questions_by_objects"]
    lines += [
        f"  {count} object{' ' if count == '1' else 's'}           {miou:.3f}    question-blind {blind[count]:.3f}"
        f"   {counts[count]} questions"
        for count, miou in summary["grounding_miou_by_objects"].items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a step that failed."""
    config = cli.parse(DemoConfig, argv, prog="python -m engine.demo")
    logs.configure(config.log_level)
    return cli.run("engine.demo", lambda: run(config))


def run(config: DemoConfig) -> None:
    """Run the missing steps, measure the models where one ran, and print the table."""
    paths.output_folder("--output", config.output)
    path = config.output / "summary.json"
    seconds, ran = run_steps(config)
    if ran or not path.exists():
        # Imported after the flags and paths are checked: it takes seconds.
        from engine.demo.held_out import summarize

        started = time.monotonic()
        losses = {f"stage {n}": config.output / "run" / f"stage{n}" / "metrics.jsonl" for n in (1, 2, 3)}
        plot_losses(losses, config.output / "losses.png")
        summary = summarize(config.output)
        seconds["summary"] = round(time.monotonic() - started, 1)
        write_atomically(path, json.dumps({**summary, "seconds": seconds}, indent=1) + "\n")
    print(table(json.loads(path.read_text())))
    print(f"\nin {config.output}: summary.json, losses.png, overlay.png, overlay.mp4, chat.mp4")
    print(f"a page to try the model: python -m pite.web --demo {shlex.quote(str(config.output))}")


if __name__ == "__main__":
    sys.exit(main())
