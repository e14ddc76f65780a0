"""The input of the step benchmark: a model with random weights and a global batch of samples like PiTe-143k's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from dataloaders.records import ABSENT, TokenizedSample
from dataloaders.samples.batch import PackedBatch, collate
from engine.layout import Memory, choose_layout, count_parameters
from engine.recipes import PAPER, Recipe
from pite import checkpoint
from pite.config import PiTeConfig
from pite.model import PiTe

RECIPE: Recipe = PAPER[2]

Step = Callable[[], Sequence[Tensor]]
"""One optimizer step on the global batch; returns its loss."""


@dataclass(frozen=True)
class Shape:
    """A model and a global batch of samples like PiTe-143k's; `answer` is the mean of gamma-distributed lengths."""

    config: PiTeConfig
    samples: int
    prompt: int
    answer: int


def tiny_shape() -> Shape:
    llm = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=4000
    )
    return Shape(PiTeConfig(llm, num_frames=32, num_points=3, vision_feature_size=64), samples=32, prompt=24, answer=32)


def paper_shape(size: str) -> Shape:
    return Shape(PiTeConfig.preset("13b" if size == "13b" else "7b"), samples=256, prompt=50, answer=65)


def make_samples(shape: Shape, seed: int = 0) -> tuple[list[TokenizedSample], list[np.ndarray]]:
    """Samples with answers of varying length (gamma of shape 2: spread .7 of the mean); 40% of tokens have tracks."""
    rng = np.random.default_rng(seed)
    config = shape.config
    samples, features = [], []
    for i in range(shape.samples):
        answer = 8 + int(rng.gamma(2.0, (shape.answer - 8) / 2))
        start = shape.prompt // 2
        ids = rng.integers(3, config.llm.vocab_size, shape.prompt + config.num_frames + answer)
        ids[start : start + config.num_frames] = 0
        targets = np.arange(len(ids) - answer, len(ids))
        placed = targets[rng.random(answer) < 0.4]
        trajectory = rng.random((len(placed), config.num_points, config.num_frames, 2), dtype=np.float32)
        trajectory[rng.random(trajectory.shape[:3]) < 0.3] = ABSENT
        samples.append(TokenizedSample(f"s{i}", f"m{i}", ids, start, config.num_frames, targets, placed, trajectory))
        features.append(rng.standard_normal((config.num_frames, config.vision_feature_size)).astype(np.float16))
    return samples, features


@dataclass(frozen=True)
class Problem:
    """The model with its LoRA, the samples for every implementation, and the layout: its token budget and memory."""

    model: PiTe
    samples: list[TokenizedSample]
    features: list[np.ndarray]
    token_budget: int
    needed: Memory

    @property
    def tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.samples)

    @property
    def normalizers(self) -> tuple[float, float]:
        targets = sum(len(s.target_positions) for s in self.samples)
        return targets, sum(s.num_coordinates for s in self.samples)

    def pack(self, members: Sequence[int]) -> PackedBatch:
        samples, features = [self.samples[i] for i in members], [self.features[i] for i in members]
        return collate(samples, features, normalizers=self.normalizers).to(self.model.device)


def copy_trainable(model: PiTe) -> PiTe:
    """A copy with its own trainable parameters, which shares the frozen weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def make_problem(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    token_budget: int | None,
    capacity: float | None = None,
) -> Problem:
    """`capacity` is the memory for the layout in bytes; None for a CPU, where micro-batches are small."""
    torch.manual_seed(0)
    model = checkpoint.random_model(shape.config, dtype=dtype, device=str(device))
    model.add_lora(rank, 2.0 * rank)
    model.set_trainable(RECIPE.trainable_modules)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.01, generator=generator))
    count = count_parameters(shape.config, RECIPE)
    samples, features = make_samples(shape)
    longest = max(len(s.token_ids) for s in samples)
    layout = choose_layout(
        shape.config, count, capacity, width=dtype.itemsize, token_budget=token_budget, longest=longest
    )
    model.decoder.checkpoint_activations(layout.recompute)
    return Problem(model, samples, features, layout.token_budget, layout.needed)
