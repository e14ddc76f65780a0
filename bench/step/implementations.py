"""The implementations of the training step: ours in several forms, and the peers of `bench.step.peers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.step.peers import packed_step, padded_step, unsloth_step
from bench.step.problem import RECIPE, Problem, Step, copy_trainable
from engine.distributed.gradients import Gradients
from engine.layout import count_parameters
from engine.loop import backward_order, compute_losses, make_optimizer
from pite.config import PiTeConfig
from pite_kernels.fp8 import why_unsupported

OURS, LOOP, UNSHARED, COMPILED, FP8 = "pite", "pite loop", "pite unshared", "pite compiled", "pite fp8"
PADDED, KEPT, PACKED, UNSLOTH = "hf padded", "hf padded, kept", "hf packed", "unsloth"


def pite_step(problem: Problem, share: bool = True) -> Step:
    """A step that trains the problem's own model."""
    model = problem.model
    batches = [batch.to(model.device) for batch in problem.batches(share)]
    optimizer = make_optimizer(model, RECIPE)
    gradients = Gradients(backward_order(model), 1)
    model.cast_lora()

    def step(update: bool = True) -> Sequence[Tensor]:
        total = torch.zeros((), device=model.device)
        for batch in batches:
            losses = compute_losses(model, batch, RECIPE)
            losses.total.backward()
            total += losses.total.detach()
        if update:
            torch.nn.utils.clip_grad_norm_([p for _, p in model.trainable()], RECIPE.max_grad_norm)
            optimizer.step()
            model.cast_lora()
        gradients.zero()
        return [total]

    return step


def with_own_lora(problem: Problem) -> Problem:
    """The problem with a copy of its model, which shares the frozen weights."""
    return replace(problem, model=copy_trainable(problem.model))


def compiled_step(problem: Problem) -> Step:
    problem = with_own_lora(problem)
    problem.model.decoder.compile_layers()
    return pite_step(problem)


def fp8_step(problem: Problem) -> Step:
    check_fp8(problem.model.device)
    problem = with_own_lora(problem)
    problem.model.quantize()
    return pite_step(problem)


def fp8_step_in_place(problem: Problem) -> Step:
    """`fp8_step` without the frozen weights in bfloat16: nothing else can be measured after it."""
    check_fp8(problem.model.device)
    problem.model.quantize()
    return pite_step(problem)


def check_fp8(device: torch.device) -> None:
    """Raises ValueError if float8 is not worth measuring on the device."""
    reason = "a CPU only emulates float8" if device.type == "cpu" else why_unsupported(device)
    if reason is not None:
        raise ValueError(reason)


STEPS: dict[str, Callable[[Problem], Any]] = {
    OURS: lambda problem: pite_step(with_own_lora(problem)),
    UNSHARED: lambda problem: pite_step(with_own_lora(problem), share=False),
    COMPILED: compiled_step,
    FP8: fp8_step,
    PADDED: lambda problem: padded_step(problem, checkpointing=True),
    KEPT: lambda problem: padded_step(problem, checkpointing=False),
    PACKED: packed_step,
    UNSLOTH: unsloth_step,
}
"""Name -> a function that builds the step. LOOP has none: it is engine.loop.train (`bench.step.loop`)."""

NAMES = (LOOP, *STEPS)
TOGETHER = tuple(name for name in NAMES if name not in (UNSHARED, UNSLOTH))
"""Those that `bench.step` times by default."""

IN_PACKED_ROWS = (OURS, LOOP, COMPILED, FP8)
"""Those that compute the rows which samples share once."""


def peer_bytes(config: PiTeConfig, names: Sequence[str]) -> float:
    """Bytes that the others hold while ours is timed: each its LoRA, gradient, moments; two also their own weights."""
    count = count_parameters(config, RECIPE)
    own_weights = 2 * count.linear * (FP8 in names) + 2 * count.total * (UNSLOTH in names)
    return 16 * (count.lora + count.heads) * len(names) + own_weights
