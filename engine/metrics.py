"""What a run says of itself: a progress bar, one JSON line per step, TensorBoard."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from dataloaders.files import write_atomically


class Metrics:
    """Writes each step's numbers to metrics.jsonl, TensorBoard and a progress bar.

    directory  of the stage; metrics.jsonl and tensorboard/ are made in it. None on all ranks but the first: silence
    start      steps already done; later lines of an interrupted run are dropped, so that each step has one line
    total      steps of the stage
    """

    def __init__(self, directory: Path | None, *, start: int, total: int, title: str) -> None:
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

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of optimizer step `step`, which counts from 1."""
        if self._silent:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
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
