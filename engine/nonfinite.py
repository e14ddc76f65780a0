"""Finds the cause of a loss or gradient that is not finite: weights, or single samples."""

from __future__ import annotations

import torch
from torch import Tensor

from dataloaders.samples.batch import PackedBatch
from engine.batches import StepSource
from engine.distributed.world import World
from engine.loop import StepResult, compute_losses
from engine.recipes import Recipe
from pite.model import PiTe

_SHOWN = 8


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite. The run stopped before it changed a parameter."""


def raise_nonfinite(result: StepResult, model: PiTe, source: StepSource, recipe: Recipe, world: World) -> None:
    """Raise NonFiniteError, on all ranks, with the step and the cause.

    If all samples of the step fail alone, the cause is the model: its tensors with non-finite values are named.
    Otherwise the samples that fail alone are named, each with its rank, and features that are not finite.
    """
    world.set_status(f"looking for the cause of a non-finite step {result.step}")
    found = world.gather(_failing_samples(result.step - 1, model, source, recipe, world))
    numbers = result.read()
    samples = [
        f"rank {rank}: the loss or gradient of {_some(names)}" for rank, (names, _, _) in enumerate(found) if names
    ]
    counts = [(names, count) for names, count, _ in found]
    what = " and ".join(samples) or "the summed gradient (not that of any single sample)"
    what += " is not finite"
    features = [name for _, _, names in found for name in names]
    if features:
        what += f", because the features of {_some(features)} in {source.store.path} are not: encode them again"
    elif all(len(names) == count for names, count in counts) and (cause := _fault_of_model(model, world, counts)):
        what = cause
    raise NonFiniteError(
        f"step {result.step}, {what} (loss {numbers.loss}, gradient norm {numbers.gradient_norm}); "
        "no parameter was updated"
    )


def _failing_samples(
    step: int, model: PiTe, source: StepSource, recipe: Recipe, world: World
) -> tuple[list[str], int, list[str]]:
    """Ids of this rank's samples of a step that fail alone, its number of samples, and media of non-finite features."""
    batches = list(source.singles(step))
    # All ranks gather sharded weights together, so all must compute equally often: `padding` is computed too.
    rounds = max(world.gather(len(batches)))
    padding = source.step(step).micro_batches[:1] * (rounds - len(batches))
    results = [is_finite(model, batch, recipe) for batch in (*batches, *padding)]
    failing = [batch for batch, finite in zip(batches, results) if not finite]
    faulty = [batch.sample_ids[0] for batch in failing if _count_nonfinite(batch.features)]
    return [batch.sample_ids[0] for batch in failing], len(batches), faulty


def is_finite(model: PiTe, batch: PackedBatch, recipe: Recipe) -> bool:
    """Whether the loss and the gradients of one sample alone are finite."""
    losses = compute_losses(model, batch.to(model.device), recipe)
    parameters = [p for _, p in model.trainable()]
    gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
    return all(_count_nonfinite(t) == 0 for t in (losses.total, *gradients) if t is not None)


def _fault_of_model(model: PiTe, world: World, found: list[tuple[list[str], int]]) -> str | None:
    """The cause in the model when every sample fails, or None if the only sample may be the cause."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    bad: dict[str, int] = {}
    for counts in world.gather({name: _count_nonfinite(tensor) for name, tensor in tensors.items()}):
        bad |= {name: count for name, count in counts.items() if count}
    if bad:
        named = _some([f"{name} ({count:,} of {tensors[name].numel():,})" for name, count in bad.items()])
        return f"every sample's loss or gradient is not finite, because weights are not: {named}"
    if sum(count for _, count in found) == 1:
        return None
    return (
        "every sample's loss or gradient is not finite, though all weights are: the samples are not the cause; numbers "
        "overflow in the model, so lower the learning rate or use --dtype float32"
    )


def _count_nonfinite(tensor: Tensor) -> int:
    """Values that are not finite, in this rank's part of a sharded tensor."""
    to_local = getattr(tensor, "to_local", None)
    local = tensor.detach() if to_local is None else to_local().detach()
    return int((~torch.isfinite(local.float())).sum()) if local.is_floating_point() else 0


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
