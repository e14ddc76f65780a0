"""The training loop: gradient accumulation, all-reduce, clipping, optimizer step, metrics.

One optimizer step runs all micro-batches forward and backward (gradient accumulation), all-reduces the gradients while
the last backward still runs, clips, updates and logs. The model divides each loss by the global batch's normalizers, so
micro-batches and ranks are summed, never averaged.

On a GPU the host reads a step's numbers one step late, when the device has finished them, so that it never waits. If a
loss or gradient is not finite, the optimizer step is skipped on the device (found_inf). So are all later steps, until
the host has read the numbers and stops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataloaders.samples.batch import PackedBatch
from engine.batches import Absent, StepBatches
from engine.distributed.gradients import Gradients
from engine.distributed.world import World
from engine.metrics import Metrics
from engine.recipes import Recipe
from pite.model import Losses, PiTe

_COORDINATE_HEADS = ("localization_projector.", "trajectory_projector.")


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite. The run stopped before it changed a parameter."""


def learning_rate(step: int, total: int, recipe: Recipe) -> float:
    """Linear warm-up to the peak, then a cosine to 0; `step` counts from 0."""
    warmup = math.ceil(total * recipe.warmup_ratio)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(model: PiTe, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; fused: one launch updates a group, and `found_inf` can skip the step.

    Each group's `rate_ratio` is its share of the learning rate. The coordinate heads have a ratio of their own.
    """
    heads = [p for name, p in model.trainable() if name.startswith(_COORDINATE_HEADS)]
    others = [p for name, p in model.trainable() if not name.startswith(_COORDINATE_HEADS)]
    groups = [
        {"params": parameters, "rate_ratio": ratio}
        for parameters, ratio in ((others, 1.0), (heads, recipe.head_rate_ratio))
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def backward_order(model: PiTe) -> list[nn.Parameter]:
    """Trainable parameters in the order in which backward finishes gradients: heads, last layer to first, adapter."""
    named = list(model.trainable())[::-1]
    return [p for name, p in sorted(named, key=lambda pair: pair[0].startswith("vision_adapter."))]


@dataclass(frozen=True)
class _Pending:
    """Numbers of a step that the device may still be computing: [loss, ce, l1, ranks to stop, norm, not finite]."""

    step: int
    numbers: Tensor
    ready: torch.cuda.Event | None
    tokens: int
    learning_rate: float
    data_wait: float


def reads_late(device: torch.device) -> bool:
    """Whether a step's numbers are read after the next step is queued. A CPU queues nothing and has them at once."""
    return device.type == "cuda"


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def compute_losses(model: PiTe, batch: PackedBatch, recipe: Recipe, absent: Absent) -> Losses:
    """The losses of one micro-batch under a stage's recipe."""
    losses: Losses = model(
        batch,
        head=recipe.head,
        label_smoothing=recipe.label_smoothing,
        trajectory_weight=recipe.trajectory_weight,
        absent=absent,
    )
    return losses


def train(
    model: PiTe,
    optimizer: torch.optim.AdamW,
    batches: Iterator[StepBatches],
    recipe: Recipe,
    world: World,
    metrics: Metrics,
    *,
    start: int,
    stop: int,
    total: int,
    absent: Absent,
    interrupted: Callable[[], bool],
    after_step: Callable[[int, Callable[[], None], bool], bool],
    find_nonfinite_samples: Callable[[int], list[str]],
    efficiency: Callable[[int, float], dict[str, float]],
) -> int:
    """Run optimizer steps `start` .. `stop`; returns the number of steps done.

    total        steps of the whole learning-rate schedule
    interrupted  whether this rank got a signal to stop; the ranks share it along with the step's other numbers
    after_step   called with the number of steps done, a function that waits for the last step's numbers, and whether
                 any rank got a signal to stop; True ends the run early
    find_nonfinite_samples  returns the ids of a step's samples whose loss or gradient is not finite
    efficiency   further metrics from a step's tokens and seconds
    Raises NonFiniteError.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    bad = torch.zeros((), device=device)
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    pending: _Pending | None = None
    stopping, late = False, reads_late(device)
    clock = time.perf_counter()

    def finish() -> None:
        nonlocal pending, clock, stopping
        if pending is None:
            return
        done, pending = pending, None
        if done.ready is not None:
            done.ready.synchronize()
        loss, ce, l1, ranks_to_stop, norm, failed = done.numbers.tolist()
        stopping = ranks_to_stop > 0
        if failed:
            found = enumerate(world.gather(find_nonfinite_samples(done.step)))
            culprits = [f"rank {rank}: the loss or gradient of {', '.join(names)}" for rank, names in found if names]
            named = " and ".join(culprits) or "the summed gradient (not that of any single sample)"
            raise NonFiniteError(
                f"step {done.step + 1}, {named} is not finite (loss {loss}, gradient norm {norm}); "
                "no parameter was updated"
            )
        now = time.perf_counter()
        seconds, clock = now - clock, now
        metrics.log(
            done.step + 1,
            {
                "loss": loss,
                "ce": ce,
                "l1": l1,
                "gradient_norm": norm,
                "learning_rate": done.learning_rate,
                "tokens": done.tokens,
                "seconds": seconds,
                "tokens_per_second": done.tokens / seconds,
                "data_wait": done.data_wait / seconds,
                **efficiency(done.tokens, seconds),
            },
        )

    with closing(Gradients(backward_order(model), world.size)) as gradients:
        for step in range(start, stop):
            before = time.perf_counter()
            world.set_status(f"waiting for the data of step {step + 1}")
            current = next(batches)
            world.set_status(f"computing step {step + 1}")
            data_wait = time.perf_counter() - before
            rate = learning_rate(step, total, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_ratio"]

            sums = torch.zeros(4, device=device)
            sums[3].fill_(float(interrupted()))  # an assignment would copy from the host and synchronize
            for left, batch in zip(range(len(current.micro_batches))[::-1], current.micro_batches):
                losses = compute_losses(model, batch.to(device), recipe, absent)
                if left == 0:
                    gradients.reduce_in_next_backward()
                losses.total.backward()
                sums[:3] += torch.stack([losses.total.detach(), losses.ce, losses.l1]).float()
            if world.watchdog is not None:
                world.watchdog.step_done(_recorded_event() if device.type == "cuda" else None)
            gradients.finish(sums)
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf)
            bad.copy_(torch.maximum(bad, (~torch.isfinite(norm + sums[0])).float()))
            optimizer.step()
            gradients.zero()

            if late:
                finish()
            numbers = torch.cat([sums, norm.float()[None], bad[None]])
            ready = None
            if device.type == "cuda":
                numbers = numbers.to("cpu", non_blocking=True)
                ready = _recorded_event()
            pending = _Pending(step, numbers, ready, current.tokens, rate, data_wait)
            if not late:
                finish()
            if after_step(step + 1, finish, stopping):
                finish()
                return step + 1
    finish()
    return stop
