"""Reads the numbers of the steps, checks them, validates and logs.

On a GPU a step's numbers are read one step late, when the device has finished them, so that the host never waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from engine.distributed.world import World
from engine.loop import StepResult
from engine.metrics import Metrics

if TYPE_CHECKING:
    from engine.validation import Validation


def reads_late(device: torch.device) -> bool:
    """Whether a step's numbers are read after the next step is queued. A CPU queues nothing and has them at once."""
    return device.type == "cuda"


class Reporter:
    """Logs each step's numbers to `metrics`.

    on_nonfinite  called with a step's result if the loss or the gradient is not finite; raises
    efficiency    further metrics from a step's computed rows, supervised tokens and seconds
    validation    losses of held-out samples at some steps, or None
    """

    def __init__(
        self,
        world: World,
        metrics: Metrics,
        *,
        on_nonfinite: Callable[[StepResult], None],
        efficiency: Callable[[float, int, float], dict[str, float]],
        validation: Validation | None = None,
    ) -> None:
        self._world, self._metrics = world, metrics
        self._on_nonfinite, self._efficiency, self._validation = on_nonfinite, efficiency, validation
        self._late = reads_late(world.device)
        self._unread: StepResult | None = None
        self._clock = time.perf_counter()

    def add(self, result: StepResult, *, now: bool) -> bool:
        """Take a step's result, and log the numbers of all steps that are due.

        now  wait for this step's numbers too, such as before a checkpoint
        Returns whether any rank got a signal to stop. Then all numbers have been read.
        """
        stop = self._read()
        self._unread = result
        validate = self._validation is not None and self._validation.due(result.step)
        if now or validate or stop or not self._late:
            stop = self._read() or stop
        return stop

    def _read(self) -> bool:
        """Log the result that has not been read yet; returns whether any rank got a signal to stop."""
        if self._unread is None:
            return False
        result, self._unread = self._unread, None
        numbers = result.read()
        if numbers.skipped:
            self._on_nonfinite(result)
        seconds = time.perf_counter() - self._clock
        values = {
            "loss": numbers.loss,
            "ce": numbers.ce,
            "l1": numbers.l1,
            "gradient_norm": numbers.gradient_norm,
            "learning_rate": result.learning_rate,
            "tokens": result.tokens,
            "rows": numbers.rows,
            "seconds": seconds,
            "samples_per_second": result.samples / seconds,
            "tokens_per_second": result.tokens / seconds,
            "data_wait": result.data_wait / seconds,
            **self._efficiency(numbers.rows, result.targets, seconds),
        }
        if self._validation is not None and self._validation.due(result.step):
            values |= self._validation.losses()
        self._metrics.log(result.step, values)
        self._clock = time.perf_counter()
        return numbers.ranks_to_stop > 0
