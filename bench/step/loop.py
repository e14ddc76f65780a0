"""engine.loop.train itself on the benchmark's global batch: collation, copies to the device and the check of every step too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from bench.measure import Timing, timing
from bench.step.problem import RECIPE, Problem, twin
from dataloaders.samples.batch import collate
from dataloaders.samples.plan import split_batch
from dataloaders.samples.prefetch import prefetch
from engine.batches import StepBatches
from engine.distributed.world import World
from engine.loop import make_optimizer, train
from engine.metrics import Metrics

WARM_UPS = 2


class _Seconds:
    """Takes the place of the metrics: what a step took, and its loss."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.losses: list[float] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.values.append(values["seconds"])
        self.losses.append(values["loss"])


def run_loop(problem: Problem, steps: int, warm: Callable[[], None] = lambda: None) -> tuple[list[float], float]:
    """(seconds of each step after the warm-ups, the first step's loss), of a copy that shares the frozen weights.

    warm  called after the warm-ups
    """
    model = twin(problem.model)
    (bins,) = split_batch([len(s.token_ids) for s in problem.samples], 1, problem.token_budget)
    device = model.device

    def prepare(step: int) -> StepBatches:
        batches = []
        for members in filter(None, bins):
            samples, features = [problem.samples[i] for i in members], [problem.features[i] for i in members]
            batch = collate(samples, features, normalizers=problem.normalizers)
            batches.append(batch.pin_memory() if device.type == "cuda" else batch)
        return StepBatches(tuple(batches), problem.tokens, len(problem.samples))

    def after_step(done: int, *_: object) -> bool:
        if done == WARM_UPS:
            warm()
        return False

    seconds, total = _Seconds(), WARM_UPS + steps
    train(
        model,
        make_optimizer(model, RECIPE),
        prefetch(prepare, range(total), workers=0 if device.type == "cpu" else 2),
        RECIPE,
        World(0, 1, device),
        cast(Metrics, cast(Any, seconds)),
        start=0,
        stop=total,
        total=total,
        absent="skip",
        interrupted=lambda: False,
        after_step=after_step,
        find_nonfinite_samples=lambda _: [],
        efficiency=lambda *_: {},
    )
    return seconds.values[WARM_UPS:], seconds.losses[0]


def loop_timing(problem: Problem, rounds: int) -> tuple[Timing, float]:
    """Of a step in the loop, with the first step's loss."""
    seconds, loss = run_loop(problem, rounds)
    return timing(seconds, None), loss


def loop_waits(problem: Problem) -> str | None:
    """Why the host waited for the device inside the loop on CUDA; None when it did not."""
    try:
        run_loop(problem, 3, warm=lambda: torch.cuda.set_sync_debug_mode("error"))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
