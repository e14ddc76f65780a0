"""An unfinished training on disk, so that a killed one continues to the same weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dataloaders.files import file_written_atomically

EVERY = 250
"""Steps from one saved state to the next."""


class Progress:
    """The state of a training: weights, optimizer, learning rate, random numbers, steps and seconds.

    file      where the state is kept; None: nowhere
    identity  the settings that the weights depend on
    """

    def __init__(self, file: Path | None = None, identity: dict[str, Any] | None = None) -> None:
        self._file, self._identity = file, identity
        self._before, self._started = 0.0, time.process_time()

    @property
    def seconds(self) -> float:
        """CPU seconds so far, with those of the runs that were killed."""
        return self._before + time.process_time() - self._started

    def resume(self, module: nn.Module, optimizer: Optimizer, schedule: LRScheduler, rng: np.random.Generator) -> int:
        """Continue where the file is; return the steps done. Raises ValueError for the state of another training."""
        self._module, self._optimizer, self._schedule, self._rng = module, optimizer, schedule, rng
        if self._file is None or not self._file.exists():
            return 0
        state = torch.load(self._file, weights_only=True)
        if state["identity"] != self._identity:
            raise ValueError(
                f"{self._file} is an unfinished training of {state['identity']}, not of {self._identity}: choose another "
                "folder, or remove it"
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        rng.bit_generator.state = state["rng"]
        self._before = state["seconds"]
        return int(state["steps"])

    def keep(self, steps: int) -> None:
        """Call after each step, with the steps done."""
        if self._file is None or steps % EVERY:
            return
        state = {
            "identity": self._identity,
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "rng": self._rng.bit_generator.state,
            "seconds": self.seconds,
            "steps": steps,
        }
        with file_written_atomically(self._file) as temporary:
            torch.save(state, temporary)

    def remove(self) -> None:
        """Call when the weights are written."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
