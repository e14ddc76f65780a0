"""The training loop on its own, on the step benchmark's small problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.step.problem import RECIPE, copy_trainable, make_problem, tiny_shape
from engine.batches import StepBatches
from engine.distributed.world import World
from engine.loop import make_optimizer, train
from engine.recipes import PAPER
from pite.model import PiTe


def losses(steps: int) -> list[float]:
    """Losses of a bfloat16 model that trains on one global batch in two micro-batches."""
    device = torch.device("cpu")
    problem = make_problem(tiny_shape(), device, torch.bfloat16, rank=4, token_budget=1200)
    model = copy_trainable(problem.model)
    batches = tuple(problem.pack(members) for members in problem.split())
    assert len(batches) > 1
    step = StepBatches(batches, problem.tokens, len(problem.samples), 1)
    world = World(0, 1, device)
    results = train(
        model, make_optimizer(model, RECIPE), iter([step] * steps), RECIPE, world, start=0, stop=steps, total=9
    )
    return [result.read().loss for result in results]


def test_adapter_and_heads_have_rates_of_their_own():
    problem = make_problem(tiny_shape(), torch.device("cpu"), torch.float32, rank=4, token_budget=1200)
    problem.model.set_trainable(("vision_adapter", "trajectory_projector"))
    recipe = replace(RECIPE, adapter_rate_ratio=25.0, head_rate_ratio=5.0)
    rates = {
        id(parameter): group["rate_ratio"]
        for group in make_optimizer(problem.model, recipe).param_groups
        for parameter in group["params"]
    }
    found = {name.partition(".")[0]: rates.pop(id(parameter)) for name, parameter in problem.model.trainable()}
    assert found == {"decoder": 1.0, "vision_adapter": 25.0, "trajectory_projector": 5.0} and not rates
    (one,) = make_optimizer(problem.model, PAPER[2]).param_groups
    assert [id(parameter) for parameter in one["params"]] == [id(each) for _, each in problem.model.trainable()]


def test_the_lora_is_cast_once_a_step_and_the_losses_are_the_same(monkeypatch: pytest.MonkeyPatch):
    casts: list[PiTe] = []
    cast_lora = PiTe.cast_lora
    monkeypatch.setattr(PiTe, "cast_lora", lambda model: casts.append(model) or cast_lora(model))
    cast = losses(3)
    assert len(casts) == 4 and all(linear.cast is not None for linear in casts[0].linear_layers())
    monkeypatch.setattr(PiTe, "cast_lora", lambda model: None)
    assert losses(3) == cast
