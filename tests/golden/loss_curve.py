"""A hundred training steps on fixed data: `python -m tests.golden.loss_curve` writes loss_curve.json again.

Weights, samples and features come from raw Philox bits, which no library release changes. It does not use the demo, its
recipe or its world. A change that alters the curve changes what every user's run computes, so its commit must explain
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from dataloaders.records import ABSENT, TokenizedSample
from dataloaders.samples.batch import collate
from engine.batches import StepBatches
from engine.distributed.world import World
from engine.loop import make_optimizer, train
from engine.recipes import Recipe
from pite import checkpoint
from pite.config import PiTeConfig
from pite.model import PiTe

FILE = Path(__file__).with_name("loss_curve.json")
STEPS = 100
NUMBERS = ("loss", "ce", "l1", "gradient_norm")
CONFIG = PiTeConfig(
    LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        rms_norm_eps=1e-5,
    ),
    num_frames=6,
    num_points=2,
    vision_feature_size=8,
)
RECIPE = Recipe(
    trainable_modules=("vision_adapter", "trajectory_projector"),
    head="trajectory",
    epochs=1,
    learning_rate=3e-3,
    warmup_ratio=0.1,
    global_batch=6,
    weight_decay=0.01,
    max_grad_norm=1.0,
    lora_rank=4,
    lora_alpha=8.0,
    label_smoothing=0.1,
    trajectory_weight=2.0,
)


class Numbers:
    """Uniform numbers from raw bits."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))

    def uniform(self, *shape: int) -> np.ndarray:
        """Float32 in [0, 1), exactly representable."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32).reshape(shape)

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        return (low + np.floor(self.uniform(count).astype(np.float64) * (high - low))).astype(np.int64)


def golden_model(recipe: Recipe = RECIPE) -> PiTe:
    model = checkpoint.empty(CONFIG, torch.float32, "cpu")
    model.add_lora(recipe.lora_rank, recipe.lora_alpha)
    numbers = Numbers(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = numbers.uniform(*parameter.shape) * 2 - 1
            if "norm" in name:
                parameter.fill_(1)
            elif name.endswith(("lora_b", "bias")):
                parameter.zero_()
            else:
                parameter.copy_(torch.from_numpy(values * np.float32(0.25)))
    model.set_trainable(recipe.trainable_modules)
    return model


def golden_samples(numbers: Numbers, count: int) -> tuple[list[TokenizedSample], list[np.ndarray]]:
    samples, features = [], []
    frames, points = CONFIG.num_frames, CONFIG.num_points
    for i in range(count):
        before, after = numbers.integers(2, 5, 1)[0], numbers.integers(7, 16, 1)[0]
        ids = numbers.integers(3, CONFIG.llm.vocab_size, before + frames + after)
        ids[before : before + frames] = 0
        targets = np.arange(len(ids) - 5, len(ids))
        placed = targets[numbers.uniform(5) < 0.6]
        trajectory = numbers.uniform(len(placed), points, frames, 2)
        trajectory[numbers.uniform(len(placed), points, frames) < 0.3] = ABSENT
        samples.append(TokenizedSample(f"s{i}", f"m{i}", ids, int(before), frames, targets, placed, trajectory))
        features.append(numbers.uniform(frames, CONFIG.vision_feature_size) * 2 - 1)
    return samples, features


def golden_steps(batches: int = 5) -> Iterator[StepBatches]:
    """Steps of two micro-batches each, cycling over the same few batches."""
    numbers = Numbers(2)
    steps = []
    for _ in range(batches):
        samples, features = golden_samples(numbers, RECIPE.global_batch)
        normalizers = tuple(collate(samples, features).normalizers.tolist())
        half = len(samples) // 2
        micro = tuple(
            collate(samples[part], features[part], normalizers=normalizers) for part in (slice(half), slice(half, None))
        )
        tokens, targets = sum(b.num_tokens for b in micro), sum(len(b.target_ids) for b in micro)
        steps.append(StepBatches(micro, tokens, len(samples), targets))
    while True:
        yield from steps


def curve(recipe: Recipe = RECIPE, dtype: torch.dtype = torch.float32) -> list[list[float]]:
    """NUMBERS of every step, as the training loop logs them."""
    model = golden_model(recipe).to(dtype)
    steps = golden_steps()
    if dtype == torch.float64:
        steps = (replace(s, micro_batches=tuple(_as_double(b) for b in s.micro_batches)) for s in steps)
    results = train(
        model,
        make_optimizer(model, recipe),
        steps,
        recipe,
        World(0, 1, torch.device("cpu")),
        start=0,
        stop=STEPS,
        total=STEPS,
    )
    lines = [result.read() for result in results]
    return [[getattr(line, name) for name in NUMBERS] for line in lines]


def _as_double(batch: Any) -> Any:
    return replace(batch, features=batch.features.double(), trajectory=batch.trajectory.double())


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [[float(f"{value:.7g}") for value in row] for row in curve()]
    FILE.write_text(json.dumps({"numbers": NUMBERS, "steps": rows}).replace("], [", "],\n  [") + "\n")
    print(f"{FILE}: loss {rows[0][0]:.4f} to {rows[-1][0]:.4f}")
