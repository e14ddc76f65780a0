"""What a run says of itself: a progress bar, one JSON line per step, TensorBoard, and Weights & Biases where asked.

tokens_per_second  useful tokens of the global batch over the step's wall time; there is no padding to count
mfu                model FLOPs utilisation: 4N FLOPs per useful token (N: the linear weights of the layers; forward 2N,
                   gradient of the activations 2N; the frozen weights have no gradient of their own), attention, heads and
                   recomputation not counted, over the data sheets' dense bfloat16 peak of all devices
data_wait          share of the step that waited for the next batch
memory_gb          peak allocation of this device so far
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

    directory  of the stage; metrics.jsonl and tensorboard/ are made in it. None on all ranks but the first: silence
    start      steps already done; later lines of an interrupted run are dropped, so that each step has one line
    total      steps of the stage
    wandb      project on Weights & Biases that gets the numbers too; its own WANDB_* variables apply
    """

    def __init__(self, directory: Path | None, *, start: int, total: int, title: str, wandb: str | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._silent = directory is None
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
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        if self._silent:
            return
        self._bar.write(text, file=sys.stderr)

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
    """The module. Raises ValueError when it is not installed."""
    try:
        return import_module("wandb")
    except ImportError:
        raise ValueError("--wandb needs the wandb package: pip install wandb, or leave the flag out") from None


def _wandb_run(project: str, directory: Path) -> Any:
    # The same directory is the same run, so that a run that is continued continues its curves.
    name = f"{directory.resolve().parent.name}-{directory.name}"
    return require_wandb().init(project=project, id=name, name=name, dir=str(directory), resume="allow")


def read(path: Path) -> list[dict[str, float]]:
    """The whole lines of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _keep_until(path: Path, step: int) -> None:
    kept = [line for line in read(path) if line["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
