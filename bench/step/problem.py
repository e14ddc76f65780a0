"""The input of the step benchmark: a model with random weights and a global batch of samples like PiTe-143k's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from dataloaders.records import ABSENT, TokenizedSample
from dataloaders.samples.batch import PackedBatch, collate
from dataloaders.samples.plan import Prefixes, split_batch
from engine.layout import Layout, Memory, choose_layout, count_parameters, memory
from engine.recipes import PAPER, Recipe
from pite import checkpoint
from pite.config import PiTeConfig
from pite.model import PiTe

RECIPE: Recipe = PAPER[2]

Step = Callable[[], Sequence[Tensor]]
"""One optimizer step on the global batch; returns its loss."""


@dataclass(frozen=True)
class Shape:
    """A model and a global batch of samples like PiTe-143k's.

    head      tokens before the frames, the same in all samples
    question  tokens between the frames and the answer
    answer    mean of the gamma-distributed number of answer tokens
    """

    config: PiTeConfig
    samples: int
    head: int
    question: int
    answer: int


def tiny_shape() -> Shape:
    llm = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=4000
    )
    return Shape(
        PiTeConfig(llm, num_frames=32, num_points=3, vision_feature_size=64),
        samples=32,
        head=12,
        question=12,
        answer=32,
    )


def paper_shape(size: str) -> Shape:
    return Shape(PiTeConfig.preset("13b" if size == "13b" else "7b"), samples=256, head=35, question=15, answer=65)


def make_samples(shape: Shape, seed: int = 0) -> tuple[list[TokenizedSample], list[np.ndarray]]:
    """Samples with answers of varying length (gamma of shape 2: spread .7 of the mean); 40% of tokens have tracks."""
    rng = np.random.default_rng(seed)
    config = shape.config
    samples, features = [], []
    start, head = shape.head, rng.integers(3, config.llm.vocab_size, shape.head)
    for i in range(shape.samples):
        answer = 8 + int(rng.gamma(2.0, (shape.answer - 8) / 2))
        ids = rng.integers(3, config.llm.vocab_size, start + config.num_frames + shape.question + answer)
        ids[:start], ids[start : start + config.num_frames] = head, 0
        targets = np.arange(len(ids) - answer, len(ids))
        placed = targets[rng.random(answer) < 0.4]
        trajectory = rng.random((len(placed), config.num_points, config.num_frames, 2), dtype=np.float32)
        trajectory[rng.random(trajectory.shape[:3]) < 0.3] = ABSENT
        samples.append(TokenizedSample(f"s{i}", f"m{i}", ids, start, config.num_frames, targets, placed, trajectory))
        features.append(rng.standard_normal((config.num_frames, config.vision_feature_size)).astype(np.float16))
    return samples, features


@dataclass(frozen=True)
class Workload:
    """A global batch for every implementation, and the rows of our micro-batches that the layout allows."""

    samples: list[TokenizedSample]
    features: list[np.ndarray]
    token_budget: int

    @property
    def tokens(self) -> int:
        """Tokens of the samples: what a trainer without padding computes."""
        return sum(len(s.token_ids) for s in self.samples)

    @property
    def rows(self) -> int:
        """Rows that ours computes."""
        return sum(batch.num_rows for batch in self.batches())

    def batches(self, share: bool = True) -> list[PackedBatch]:
        """Our micro-batches, on the CPU; `share`: what samples have in common is computed once."""
        return [self.pack(members, share) for members in self.split(share)]

    def split(self, share: bool = True) -> list[list[int]]:
        """The samples of each of our micro-batches."""
        first, count = self.samples[0], len(self.samples)
        prefixes = Prefixes(first.frame_start, first.frame_start + first.num_features, np.arange(count))
        lengths = [len(s.token_ids) for s in self.samples]
        (bins,) = split_batch(lengths, 1, self.token_budget, prefixes if share else None)
        return [members for members in bins if members]

    @property
    def normalizers(self) -> tuple[float, float]:
        targets = sum(len(s.target_positions) for s in self.samples)
        return targets, sum(s.num_coordinates for s in self.samples)

    def pack(self, members: Sequence[int], share: bool = True) -> PackedBatch:
        samples, features = [self.samples[i] for i in members], [self.features[i] for i in members]
        return collate(samples, features, normalizers=self.normalizers, share=share)

    def pack_whole(self, members: Sequence[int]) -> PackedBatch:
        """All tokens of all samples, as other trainers compute them: nothing is shared, and the last token is a row."""
        # The collator leaves out a sample's last token, so this appends one.
        samples = [replace(s, token_ids=np.append(s.token_ids, 0)) for s in (self.samples[i] for i in members)]
        features = [self.features[i] for i in members]
        return collate(samples, features, normalizers=self.normalizers, share=False)


@dataclass(frozen=True)
class Problem(Workload):
    """A workload and the model with its LoRA, in the layout that the engine chooses."""

    model: PiTe
    recompute: int

    def needed(self, fp8: bool = False, share: bool = True) -> Memory:
        """`engine.layout`'s estimate for the largest micro-batch, with its shares of read rows and of copied keys."""
        config, largest = self.model.config, max(self.batches(share), key=lambda batch: batch.num_rows)
        keys = largest.num_rows if largest.kv_rows is None else len(largest.kv_rows)
        return memory(
            config,
            count_parameters(config, RECIPE),
            largest.num_rows,
            self.model.dtype.itemsize,
            fp8=fp8,
            recompute=self.recompute,
            read=len(largest.read_rows) / largest.num_rows,
            copied=keys / largest.num_rows - 1,
        )


def copy_trainable(model: PiTe) -> PiTe:
    """A copy with its own trainable parameters, which shares the frozen weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def choose(
    shape: Shape,
    samples: Sequence[TokenizedSample],
    width: int,
    capacity: float | None,
    token_budget: int | None = None,
) -> Layout:
    """The engine's layout for these samples; `width` is the bytes of the frozen dtype."""
    longest = max(len(s.token_ids) for s in samples)
    count = count_parameters(shape.config, RECIPE)
    return choose_layout(shape.config, count, capacity, width=width, token_budget=token_budget, longest=longest)


def make_workload(shape: Shape, width: int, capacity: float | None) -> Workload:
    """The workload without a model, in the layout that a model of this shape would have."""
    samples, features = make_samples(shape)
    return Workload(samples, features, choose(shape, samples, width, capacity).token_budget)


def make_problem(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    token_budget: int | None,
    capacity: float | None = None,
) -> Problem:
    """`capacity` is the memory for the layout in bytes; None for a CPU, where micro-batches are small.

    Raises ValueError, before the model is built, if nothing fits.
    """
    samples, features = make_samples(shape)
    layout = choose(shape, samples, dtype.itemsize, capacity, token_budget)
    torch.manual_seed(0)
    model = checkpoint.random_model(shape.config, dtype=dtype, device=str(device))
    model.add_lora(rank, 2.0 * rank)
    model.set_trainable(RECIPE.trainable_modules)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.01, generator=generator))
    model.decoder.checkpoint_activations(layout.recompute)
    return Problem(samples, features, layout.token_budget, model, layout.recompute)
