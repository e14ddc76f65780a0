"""Rounding of small updates in bfloat16: earlier stages are rounded once, the last stage is not rounded.

The figures of docs/training.md, "Merging and rounding": `pytest -s tests/pite/test_rounding.py` prints them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pite import checkpoint, names
from pite.checkpoint import from_pretrained, save_pretrained
from pite.generate import language_model
from pite.model import PiTe
from tests.pite.test_model import hf_logits
from tests.samples import random_batch, tiny_config

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "initializer_range": 0.02}
RANK, ALPHA, RATIO = 64, 128.0, 0.003
"""The paper's LoRA; |dW| / |W| of one stage."""


@torch.no_grad()
def add_small_lora(model: PiTe, seed: int) -> None:
    """Add a LoRA whose update of each projection has RATIO times the weight's Frobenius norm."""
    model.add_lora(RANK, ALPHA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, linear, _ in names.linear_layers(model):
        linear.lora_b.data.normal_(0, 1, generator=generator)
        parts = zip(linear.weight.split(linear.splits), linear.lora_a.chunk(len(linear.splits)))
        for (weight, a), b in zip(parts, linear.lora_b.data.split(linear.splits)):
            b *= RATIO * weight.float().norm() / (linear.scale * b @ a).norm()


def random_bfloat16_model() -> PiTe:
    """Float32 weights of std .02 that are exact in bfloat16, and a stage's LoRA with seed 1."""
    model = checkpoint.random_model(tiny_config(**SHAPE), dtype=torch.float32)
    for tensor in names.language_model_tensors(model).values():
        tensor.copy_(tensor.bfloat16())
    add_small_lora(model, seed=1)
    return model


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A language model, and three stages trained on it independently."""
    root = tmp_path_factory.mktemp("stages")
    llm = checkpoint.random_model(tiny_config(**SHAPE), dtype=torch.bfloat16)
    save_pretrained(llm, root / "llm")
    outputs: list[Path] = []
    for seed in (1, 2, 3):
        model = from_pretrained(root / "llm", torch.bfloat16)
        add_small_lora(model, seed)
        output = root / str(seed)
        output.mkdir()
        lineage = {"stage": seed, "language_model": str(root / "llm"), "merged": list(map(str, outputs))}
        checkpoint.save_stage(model, output, lineage)
        outputs.append(output)
    return [root / "llm", *outputs]


def projections(model: PiTe) -> Tensor:
    return torch.cat([linear.weight.data.flatten() for _, linear, _ in names.linear_layers(model)])


def test_three_stages_summed_lose_one_rounding(stages: list[Path]) -> None:
    llm, *adapters = stages
    base = from_pretrained(llm, torch.bfloat16)
    exact = checkpoint.WeightLoader(base.config, llm, adapters, dtype=torch.float32).model()
    once = checkpoint.WeightLoader(base.config, llm, adapters, dtype=torch.bfloat16).model()
    one_by_one = from_pretrained(llm, torch.bfloat16)
    stage_1 = checkpoint.WeightLoader(base.config, llm, adapters[:1], dtype=torch.bfloat16).model()
    for adapter in adapters:
        checkpoint.load_lora(one_by_one, adapter)
        one_by_one.merge_lora()

    before, truth = projections(base), projections(exact)
    update = truth - before.float()
    merged = {"one stage": projections(stage_1), "one by one": projections(one_by_one), "once": projections(once)}
    unchanged = {name: (weights == before).float().mean().item() for name, weights in merged.items()}
    errors = {name: ((merged[name].float() - truth).norm() / update.norm()).item() for name in ("one by one", "once")}
    print(
        f"|dW| / |W| of three stages {update.norm() / before.float().norm():.4f}; unchanged {unchanged}, errors {errors}"
    )
    assert 0.4 < unchanged["one stage"] < 0.6
    assert torch.equal(merged["once"], truth.bfloat16())
    assert unchanged["once"] < unchanged["one by one"]
    assert errors["once"] < 0.7 * errors["one by one"]


@torch.inference_mode()
def test_generation_computes_what_training_did() -> None:
    exact = random_bfloat16_model()
    batch = random_batch(64, exact.config)
    truth = exact.logits(exact.hidden_states(batch, all_rows=True))
    model, merged = (checkpoint.empty(exact.config, torch.bfloat16, "cpu") for _ in range(2))
    for half in (model, merged):
        half.add_lora(RANK, ALPHA)
        half.load_state_dict(exact.state_dict())
    merged.merge_lora()

    logits = {
        "packed": model.logits(model.hidden_states(batch, all_rows=True)),
        "generated": hf_logits(language_model(model), model, batch),
        "merged": hf_logits(language_model(merged), merged, batch),
    }
    errors = {name: ((found.float() - truth).norm() / truth.norm()).item() for name, found in logits.items()}
    print(", ".join(f"{name} {error:.3%}" for name, error in errors.items()))
    assert errors["generated"] == pytest.approx(errors["packed"], rel=0.05)
    assert errors["generated"] < 0.95 * errors["merged"]
