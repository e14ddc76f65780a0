"""Training checkpoints: the state that a run needs to resume bit for bit, without the frozen weights.

A checkpoint holds the trainable parameters and AdamW's moments. Every rank has them whole under any layout, so rank 0
alone writes them and any number of ranks reads them; torch.distributed.checkpoint (DCP) does both. A step waits only
for a copy in host memory. DCP's thread writes the copy while training goes on.

On disk it is a directory `step-00000100` of safetensors files with their index (DCP's usual format would be a pickle)
and one JSON file of ours with their checksums. It is written under a temporary name and renamed, so after a kill or
with a full disk the previous checkpoint stays whole. A damaged checkpoint is renamed; it does not count and is never
deleted. The data need no state: the batch plan is a function of the step.
"""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult

from dataloaders.files import put_in_place, remove, sha256, temporary_sibling
from engine.identity import first_difference
from engine.recipes import Recipe

# On purpose, a single process saves, and each process loads for itself.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

STATE_FILE = "state.json"
FILE_BYTES = 25 * 2**20
"""About the size of a file. safetensors holds Python's lock while it serializes one: about 0.03 s (480 MB: 0.65 s)."""

_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
"""Errors of reading a checkpoint that mean a missing or unreadable part of it."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class ResumeError(ValueError):
    """A checkpoint does not belong to this run, or all are damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, after `step` optimizer steps."""

    path: Path
    step: int


def tensors_of(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names in it, without a copy."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return tensors


class _Storage(HuggingFaceStorageWriter):
    """DCP's storage for one checkpoint: a hidden directory, renamed to `target` when it is complete."""

    def __init__(
        self, target: Path, tensors: dict[str, Tensor], content: dict[str, Any], finished: Callable[[Path], None]
    ) -> None:
        ends = accumulate(tensor.nbytes for tensor in tensors.values())
        files = {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends)}
        super().__init__(str(temporary_sibling(target)), files)
        # All tensors are in host memory already. To copy ahead, DCP's thread would create a CUDA context on device 0.
        self.per_thread_copy_ahead = 0
        self._target, self._content, self._finished = target, content, finished

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called after the last tensor, still in DCP's thread: write the JSON file and rename."""
        super().finish(metadata, results)
        temporary = Path(self.path)
        content = {**self._content, "sha256": {file.name: sha256(file) for file in temporary.iterdir()}}
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        put_in_place(temporary, self._target)
        self._finished(self._target)


class CheckpointWriter:
    """Writes the checkpoints of one run in the background; a save waits for the previous one.

    keep       number of the newest whole checkpoints to keep
    continued  the checkpoint from which the run resumed
    Raises ValueError, at the next call or at the end of its block, if a checkpoint could not be written.
    """

    def __init__(
        self, directory: Path, identity: dict[str, Any], keep: int, continued: Checkpoint | None = None
    ) -> None:
        self._directory, self._identity, self._keep = directory, identity, keep
        self._whole = [continued.path] if continued else []
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True)
        self._saving: tuple[int, Future[Metadata]] | None = None

    def save(self, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Copy the state, as it is after all queued work, and start to write it."""
        self.wait()
        _remove_unfinished(self._directory)
        tensors = tensors_of(parameters, optimizer)
        if self._stager.state_dict_cache is None:
            # Allocated once, since page-locking is slow. The stager's own buffers would be page-locked on a CPU too.
            self._stager.state_dict_cache = {
                n: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for n, t in tensors.items()
            }
        content = {"step": step, "identity": self._identity}
        storage = _Storage(self._directory / _name(step), tensors, content, self._delete_old)
        saving = dcp.async_save(tensors, storage_writer=storage, async_stager=self._stager, no_dist=True)
        self._saving = step, cast("Future[Metadata]", saving)

    def _delete_old(self, written: Path) -> None:
        """Delete checkpoints older than the newest `keep` that are known to be whole; damaged ones do not count."""
        self._whole = [*self._whole, written][-self._keep :]
        if len(self._whole) == self._keep:
            for path in _directories(self._directory):
                if path.name < self._whole[0].name:
                    shutil.rmtree(path, ignore_errors=True)  # a checkpoint too many is no reason to stop

    def wait(self) -> None:
        """Wait until the last checkpoint is whole on disk."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        error = saving.exception()
        if error is None:
            return
        _remove_unfinished(self._directory)
        if isinstance(error, CheckpointException):
            error = _root_cause(error)
        if not isinstance(error, OSError):
            raise error
        whole, _ = newest_checkpoint(self._directory)
        kept = f"the last whole one is {whole.path}" if whole else "there is none yet"
        raise ValueError(f"checkpoint of step {step} could not be written ({error.strerror}); {kept}") from error

    def check(self) -> None:
        """Raise the error of the last save, if it has failed; does not wait."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        else:
            # The error that ended the run is raised, not one of its last save.
            with suppress(Exception):
                self.wait()


def newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest whole checkpoint, and each newer damaged one with the reason, newest first."""
    damaged: dict[Path, str] = {}
    for path in reversed(_directories(directory)):
        try:
            return Checkpoint(path, _verify(path)), damaged
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _DAMAGE:
                raise  # such as a lost connection to the disk, which damages nothing
            damaged[path] = str(error)
    return None, damaged


def _verify(path: Path) -> int:
    """Verify a checkpoint and return its number of steps. Raises one of several exceptions if it is damaged."""
    content = json.loads((path / STATE_FILE).read_text())
    for name, checksum in content["sha256"].items():
        if sha256(path / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
    step: int = content["step"]
    if path.name != _name(step) or not content["sha256"] or "identity" not in content:
        raise ValueError(f"{STATE_FILE} is another checkpoint's, or incomplete")
    return step


def resume_point(directory: Path, start_over: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, None for a start at step 0, and a warning for each damaged one that was renamed.

    Call in one process only: damaged checkpoints newer than the whole one are renamed to `damaged-step-00000040`.
    start_over  start at step 0 if all are damaged; without it that raises ResumeError, and nothing is renamed
    """
    whole, damaged = newest_checkpoint(directory)
    aside = sorted(directory.glob("damaged-step-*"))
    if whole is None and (damaged or aside) and not start_over:
        example = next(iter(damaged), aside[-1] if aside else directory)
        why = f" ({damaged[example]})" if example in damaged else ""
        raise ResumeError(
            f"all checkpoints in {directory} are damaged, {example.name}{why} among them: "
            "restore one from a copy, or add --start-over-if-damaged to begin this stage again at step 0"
        )
    next_try = f"falling back to step {whole.step}" if whole else "starting at step 0"
    messages = [
        f"checkpoint {path} is damaged ({why}): set aside as {_set_aside(path).name}, {next_try}"
        for path, why in damaged.items()
    ]
    return whole, messages


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it no longer counts as one."""
    target, number = path.with_name(f"damaged-{path.name}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"damaged-{path.name}-{number}")
    return path.rename(target)


def check_identity(saved: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    """Raise ResumeError naming the first difference between the identity saved in `path` and this run's.

    A number of the recipe that is not saved has its default: it was added to the recipe after that run.
    """
    recipe = saved.get("recipe")
    if isinstance(recipe, dict):
        added = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
        saved = {**saved, "recipe": {**added, **recipe}}
    difference = first_difference(saved, identity)
    if difference is not None:
        name, was, now = difference
        raise ResumeError(
            f"cannot continue from {path}: {name} was {was} there and is {now} now; change it back (the config.yaml of "
            "that --output has its flags), or start afresh in another --output"
        )


def check_resumable(directory: Path, identity: dict[str, Any]) -> None:
    """Raise ResumeError if the newest checkpoint belongs to another run or version; called before models load."""
    for path in reversed(_directories(directory)):
        try:
            content = json.loads((path / STATE_FILE).read_text())
        except (OSError, ValueError):
            continue  # damaged; `newest_checkpoint` reports it
        if isinstance(content, dict) and "fingerprint" in content:
            raise ResumeError(
                f"checkpoint {path} was written by an earlier version: finish the run with that one, "
                "or start afresh in another --output"
            )
        if isinstance(content, dict) and isinstance(content.get("identity"), dict):
            return check_identity(content["identity"], identity, path)


def restore_checkpoint(
    checkpoint: Checkpoint,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
) -> None:
    """Load a checkpoint into the parameters and the optimizer.

    Raises ResumeError naming the first difference if a run with another identity wrote it.
    """
    check_identity(json.loads((checkpoint.path / STATE_FILE).read_text())["identity"], identity, checkpoint.path)
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    reader = HuggingFaceStorageReader(str(checkpoint.path))
    try:
        dcp.load(tensors_of(parameters, optimizer), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise _root_cause(error) from error


def _root_cause(error: CheckpointException) -> BaseException:
    """The error of the one process that took part."""
    return next(iter(error.failures.values()))[0]


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _directories(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("step-*") if p.is_dir())


def _remove_unfinished(directory: Path) -> None:
    """Remove what failed or killed writes left: everything unfinished, since a run's folder has a single writer."""
    for path in directory.glob(".step-*"):
        remove(path)
