"""Training checkpoints: everything a resumed run needs to continue bit for bit, and nothing that is frozen.

Only what learns is in it, which every rank has whole under any layout: rank 0 writes it, any number of ranks reads it.
The step waits for a copy in host memory; a thread writes that copy while training goes on. torch.distributed.checkpoint
would share the writing among the ranks, but its metadata file is a pickle, and there is little to share: 12 bytes for
each of 160 or 250 million numbers. A checkpoint is a directory `step-00000100` of one safetensors file (trainable
parameters and AdamW's moments) and one JSON file. It is written beside and renamed, so a kill or a full disk leaves the
previous one whole. The data need no state: the batch plan is a function of the step.
"""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dataloaders.files import directory_written_atomically, sha256, write_tensors

TENSORS, STATE = "state.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class ResumeError(ValueError):
    """A checkpoint that does not belong to the run that was asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: `step` optimizer steps are in it."""

    path: Path
    step: int


def tensors_of(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name there; not copied."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return tensors


def save(directory: Path, step: int, tensors: dict[str, Tensor], fingerprint: dict[str, Any], keep: int) -> Checkpoint:
    """Write `step-XXXXXXXX` under `directory` and remove all but the newest `keep`.

    Raises OSError when the disk is full; what was there before is untouched then.
    """
    target = directory / f"step-{step:08d}"
    with directory_written_atomically(target) as beside:
        write_tensors(beside / TENSORS, tensors)
        content = {"step": step, "fingerprint": fingerprint, "sha256": sha256(beside / TENSORS)}
        (beside / STATE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    for old in _complete(directory)[:-keep]:
        shutil.rmtree(old)
    return Checkpoint(target, step)


class Writer:
    """Writes checkpoints of one run, each while training goes on; the next one waits for the one before.

    Raises ValueError, at the next call or the end of its block, when one could not be written.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any], keep: int) -> None:
        self._directory, self._fingerprint, self._keep = directory, fingerprint, keep
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: tuple[int, OSError] | None = None

    def save(self, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Copy the state as it is after everything queued so far, and have it written."""
        self.wait()
        source = tensors_of(parameters, optimizer)
        if not self._copies:
            # Made once: page-locked memory is dear to allocate, and only from it are copies asynchronous.
            self._copies = {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for n, t in source.items()}
        for name, tensor in source.items():
            self._copies[name].copy_(tensor, non_blocking=True)
        copied = None
        if any(t.is_cuda for t in source.values()):
            copied = torch.cuda.Event()
            copied.record()
        self._thread = threading.Thread(target=self._write, args=(step, copied), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is whole on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            (step, error), self._error = self._error, None
            whole, _ = newest(self._directory)
            kept = f"the last whole one is {whole.path}" if whole else "there is none yet"
            raise ValueError(f"checkpoint of step {step} could not be written ({error.strerror}); {kept}") from error

    def check(self) -> None:
        """Raise what the last checkpoint ran into, if it has; wait for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def _write(self, step: int, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            torch.cuda.set_device(copied.device)  # a thread starts on device 0, and would open a context there
            copied.synchronize()
        try:
            save(self._directory, step, self._copies, self._fingerprint, self._keep)
        except OSError as error:
            self._error = (step, error)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()


def newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each newer one that is not."""
    complaints: list[str] = []
    for path in reversed(_complete(directory)):
        try:
            content = json.loads((path / STATE).read_text())
            if sha256(path / TENSORS) != content["sha256"]:
                raise ValueError("its tensors do not match their checksum")
            return Checkpoint(path, content["step"]), complaints
        except (OSError, ValueError, KeyError) as error:
            complaints.append(f"checkpoint {path} is damaged ({error}): falling back to the one before")
    return None, complaints


def compare(saved: dict[str, Any], fingerprint: dict[str, Any], path: Path) -> None:
    """Raise ResumeError naming the first difference between what made `path` and what is asked for."""
    for key in sorted({*saved, *fingerprint}):
        if saved.get(key) != fingerprint.get(key):
            raise ResumeError(
                f"cannot resume from {path}: {key} was {saved.get(key)} there and is {fingerprint.get(key)} now; "
                "change it back, or start afresh in another --output"
            )


def restore(
    checkpoint: Checkpoint,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
) -> None:
    """Put a checkpoint's numbers into the parameters and the optimizer.

    Raises ResumeError naming the first difference when it was made by a run with another fingerprint.
    """
    compare(json.loads((checkpoint.path / STATE).read_text())["fingerprint"], fingerprint, checkpoint.path)
    tensors = load_file(checkpoint.path / TENSORS)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            moments = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS}
            optimizer.state[parameter] = {m: t if m == "step" else t.to(parameter.device) for m, t in moments.items()}
            if parameter.is_cuda:
                optimizer.state[parameter]["step"] = moments["step"].to(parameter.device)


def _complete(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("step-*") if p.is_dir())
