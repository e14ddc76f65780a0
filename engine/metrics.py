"""The metrics of a run: progress bar, metrics.jsonl with one line per step, TensorBoard, optionally Weights & Biases.

tokens             of the global batch's samples: what a trainer without padding computes
rows               that are computed: what samples of a micro-batch share is computed once
samples_per_second, tokens_per_second   over the step's wall time
mfu                model FLOPs utilisation: 4N FLOPs per computed row (N: the linear weights of the layers; forward 2N,
                   gradient of the activations 2N; the frozen weights have no gradient of their own; in the last layer
                   only rows that a head reads), over the data sheets' dense bfloat16 peak of all devices. Attention,
                   heads and activation checkpointing are not counted
data_wait          share of the step spent waiting for the next batch
memory_gb          peak allocation of this device so far
validation_loss, validation_ce, validation_l1   of the held-out samples, at the steps that validate
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from dataloaders.files import write_atomically


class Metrics:
    """Writes each step's numbers to metrics.jsonl, TensorBoard and a progress bar.

    directory  the stage's; metrics.jsonl and tensorboard/ are made in it. None, on all ranks but 0, disables all output
    start      steps already done; later lines of an interrupted run are dropped, so that each step has one line
    total      steps of the stage
    wandb      project on Weights & Biases that gets the numbers too; its WANDB_* environment variables apply
    """

    def __init__(self, directory: Path | None, *, start: int, total: int, title: str, wandb: str | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._silent = directory is None
        self._validation = ""
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=title,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=self._silent,
        )
        if directory is None:
            return
        path = directory / "metrics.jsonl"
        _keep_until(path, start)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self._wandb = None if wandb is None else _wandb_run(wandb, directory)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of optimizer step `step`, which counts from 1."""
        if self._silent:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        shown: dict[str, str] = {k: f"{values[k]:.3f}" for k in ("loss", "ce", "l1") if k in values}
        for key, label in (("tokens_per_second", "tok/s"), ("mfu", "MFU"), ("data_wait", "wait"), ("memory_gb", "GB")):
            if key in values:
                shown[label] = f"{values[key]:,.0f}" if values[key] >= 100 else f"{values[key]:.2f}"
        if "rows" in values:
            shown["rows"] = f"{values['rows'] / values['tokens']:.0%}"
        if "validation_loss" in values:
            self._validation = f"{values['validation_loss']:.3f}"
        if self._validation:
            shown["val"] = self._validation
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._silent:
            return
        self._board.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))


def require_wandb() -> Any:
    """Import wandb. Raises ValueError if it is not installed."""
    try:
        return import_module("wandb")
    except ImportError:
        raise ValueError("--wandb needs the wandb package: pip install wandb, or leave the flag out") from None


def _wandb_run(project: str, directory: Path) -> Any:
    # The id is a function of the directory, so that a resumed run continues its curves.
    name = f"{directory.resolve().parent.name}-{directory.name}"
    return require_wandb().init(project=project, id=name, name=name, dir=str(directory), resume="allow")


def read_metrics(path: Path, *, strict: bool = False) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl.

    strict  raise ValueError for a missing file and for a last line that a kill has cut off; by default a missing file
            has no lines, and the cut line is left out
    Raises ValueError naming file and line, where a line is not a JSON object with a step.
    """
    if not path.is_file():
        if strict:
            raise ValueError(f"{path}: no such file")
        return []
    *whole, last = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate([*whole, last] if strict and last else whole, start=1):
        try:
            line = json.loads(text)
            int(line["step"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: not a JSON object with a step") from None
        lines.append(line)
    return lines


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after a step."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
