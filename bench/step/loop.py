"""The training loop on the benchmark's global batch, with collation, copies to the device and the checks of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from bench.measure import Timing, timing
from bench.step.problem import RECIPE, Problem, copy_trainable
from dataloaders.samples.prefetch import prefetch
from engine.batches import StepBatches
from engine.distributed.world import World
from engine.loop import StepResult, make_optimizer, train
from engine.metrics import Metrics
from engine.report import Reporter

WARM_UPS = 2


class _StepTimes:
    """Replaces engine.metrics.Metrics: records the seconds and the loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.seconds.append(values["seconds"])
        self.losses.append(values["loss"])


def run_loop(problem: Problem, steps: int, warm: Callable[[], None] = lambda: None) -> tuple[list[float], float]:
    """(seconds of each step after the warm-up, the first step's loss); trains a copy that shares the frozen weights.

    warm  called after the warm-up steps
    """
    model = copy_trainable(problem.model)
    bins, device = problem.split(), model.device

    def prepare(step: int) -> StepBatches:
        batches = []
        for members in bins:
            batch = problem.pack(members)
            batches.append(batch.pin_memory() if device.type == "cuda" else batch)
        targets = sum(len(batch.target_ids) for batch in batches)
        return StepBatches(tuple(batches), problem.tokens, len(problem.samples), targets)

    times, total, world = _StepTimes(), WARM_UPS + steps, World(0, 1, device)
    reporter = Reporter(world, cast(Metrics, cast(Any, times)), on_nonfinite=_stop, efficiency=lambda *_: {})
    batches = prefetch(prepare, range(total), workers=0 if device.type == "cpu" else 2)
    optimizer = make_optimizer(model, RECIPE)
    for result in train(model, optimizer, batches, RECIPE, world, start=0, stop=total, total=total):
        reporter.add(result, now=result.step == total)
        if result.step == WARM_UPS:
            warm()
    return times.seconds[WARM_UPS:], times.losses[0]


def _stop(result: StepResult) -> None:
    raise ValueError(f"step {result.step} is not finite")


def loop_timing(problem: Problem, rounds: int) -> tuple[Timing, float]:
    """The timing of a step in the loop, and the first step's loss."""
    seconds, loss = run_loop(problem, rounds)
    return timing(seconds, None), loss


def find_loop_sync(problem: Problem, steps: int = 3) -> str | None:
    """The error of torch's sync debug mode if `steps` steps of the loop synchronize with the GPU, else None."""
    try:
        run_loop(problem, steps, warm=lambda: torch.cuda.set_sync_debug_mode("error"))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
