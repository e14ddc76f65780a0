"""The training loop: gradient accumulation, all-reduce, clipping, optimizer step.

One optimizer step runs all micro-batches forward and backward (gradient accumulation), all-reduces the gradients while
the last backward still runs, clips and updates. The model divides each loss by the global batch's normalizers, so
micro-batches and ranks are summed, never averaged.

The loop yields a `StepResult` after each step. Reading its numbers waits for the device; `engine.report` reads them one
step late on a GPU. If a loss or gradient is not finite, the optimizer step is skipped on the device (found_inf). So are
all later steps, until the host has read the numbers and stops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataloaders.samples.batch import PackedBatch
from engine.batches import StepBatches
from engine.distributed.gradients import Gradients
from engine.distributed.world import World
from engine.recipes import Recipe
from pite.model import Losses, PiTe

_ADAPTER = ("vision_adapter.", "mm_projector.")
_COORDINATE_HEADS = ("localization_projector.", "trajectory_projector.")


def learning_rate(step: int, total: int, recipe: Recipe) -> float:
    """Linear warm-up to the peak, then a cosine to 0; `step` counts from 0."""
    warmup = math.ceil(total * recipe.warmup_ratio)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _rate_ratio(name: str, recipe: Recipe) -> float:
    """A parameter's share of the learning rate."""
    if name.startswith(_ADAPTER):
        return recipe.adapter_rate_ratio
    return recipe.head_rate_ratio if name.startswith(_COORDINATE_HEADS) else 1.0


def make_optimizer(model: PiTe, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; fused: one launch updates a group, and `found_inf` can skip the step.

    Each group's `rate_ratio` is its share of the learning rate. The adapter and the coordinate heads have their own.
    """
    groups = [
        {"params": [parameter for _, parameter in named], "rate_ratio": ratio}
        for ratio, named in groupby(model.trainable(), key=lambda pair: _rate_ratio(pair[0], recipe))
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def backward_order(model: PiTe) -> list[nn.Parameter]:
    """Trainable parameters in the order in which backward finishes gradients: heads, last layer to first, adapter."""
    named = list(model.trainable())[::-1]
    return [p for name, p in sorted(named, key=lambda pair: pair[0].startswith((*_ADAPTER, "vid_edges")))]


class StepNumbers(NamedTuple):
    """The numbers of an optimizer step, for the whole global batch.

    rows           computed on all ranks
    ranks_to_stop  number of ranks that had got a signal to stop when the step began
    skipped        whether the optimizer step was skipped, because of a non-finite number in this step or an earlier one
    """

    loss: float
    ce: float
    l1: float
    rows: float
    ranks_to_stop: float
    gradient_norm: float
    skipped: float


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, whose numbers the device may still be computing.

    step       its number, from 1: the optimizer steps done with it
    samples, tokens, targets  of the global batch, as in `StepBatches`
    data_wait  seconds that the host waited for the batch
    """

    step: int
    samples: int
    tokens: int
    targets: int
    learning_rate: float
    data_wait: float
    numbers: Tensor
    ready: torch.cuda.Event | None

    def read(self) -> StepNumbers:
        """The step's numbers; waits until the device has finished the step."""
        if self.ready is not None:
            self.ready.synchronize()
        return StepNumbers(*self.numbers.tolist())


def compute_losses(model: PiTe, batch: PackedBatch, recipe: Recipe) -> Losses:
    """The losses of one micro-batch under a stage's recipe."""
    losses: Losses = model(
        batch,
        head=recipe.head,
        label_smoothing=recipe.label_smoothing,
        trajectory_weight=recipe.trajectory_weight,
        absent=recipe.absent,
    )
    return losses


def train(
    model: PiTe,
    optimizer: torch.optim.AdamW,
    batches: Iterator[StepBatches],
    recipe: Recipe,
    world: World,
    *,
    start: int,
    stop: int,
    total: int,
    stop_requested: Callable[[], bool] = lambda: False,
    reduce_dtype: torch.dtype | None = None,
) -> Generator[StepResult, None, None]:
    """Run optimizer steps `start` .. `stop`, and yield each one's result. Close the iterator to end earlier.

    total           steps of the whole learning-rate schedule
    stop_requested  whether this rank got a signal to stop; the ranks share it along with the step's other numbers
    reduce_dtype    dtype in which the ranks sum the gradients; None for the gradients' own
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    skipped = torch.zeros((), device=device)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    model.cast_lora()
    with closing(Gradients(backward_order(model), world.size, reduce_dtype=reduce_dtype)) as gradients:
        for step in range(start, stop):
            world.set_status(f"waiting for the data of step {step + 1}")
            before = time.perf_counter()
            current = next(batches)
            data_wait = time.perf_counter() - before
            world.set_status(f"computing step {step + 1}")

            rate = learning_rate(step, total, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_ratio"]

            sums = torch.zeros(5, device=device)
            # An assignment would copy from the host and synchronize.
            sums[3].fill_(float(current.rows))
            sums[4].fill_(float(stop_requested()))
            for left, batch in zip(range(len(current.micro_batches))[::-1], current.micro_batches):
                losses = compute_losses(model, batch.to(device), recipe)
                if left == 0:
                    gradients.reduce_in_next_backward()
                losses.total.backward()
                sums[:3] += torch.stack([losses.total.detach(), losses.ce, losses.l1]).float()
            world.step_done()

            gradients.finish(sums)
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf)
            skipped.copy_(torch.maximum(skipped, (~torch.isfinite(norm + sums[0])).float()))
            optimizer.step()
            model.cast_lora()
            gradients.zero()

            numbers, ready = _start_copy(torch.cat([sums, norm.float()[None], skipped[None]]))
            counts = current.samples, current.tokens, current.targets
            yield StepResult(step + 1, *counts, rate, data_wait, numbers, ready)


def _start_copy(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a step's numbers to the host; the event happens when they are there."""
    if numbers.device.type != "cuda":
        return numbers, None
    copied, ready = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
    ready.record()
    return copied, ready
