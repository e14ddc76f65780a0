"""Random tokenized samples and tiny models, for tests without real data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dataloaders.records import ABSENT, TokenizedSample
from dataloaders.samples.batch import PackedBatch, collate
from pite import checkpoint
from pite.architectures import ARCHITECTURES
from pite.config import PiTeConfig
from pite.model import PiTe


def tiny_config(kv_heads: int = 4, architecture: str = "llama", **llm: object) -> PiTeConfig:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": kv_heads, "vocab_size": 120, "initializer_range": 0.1, **llm}
    return PiTeConfig(ARCHITECTURES[architecture].config(**shape), num_frames=8, num_points=3, vision_feature_size=16)


def tiny_model(kv_heads: int = 4, lora: bool = True, seed: int = 0, **llm: Any) -> PiTe:
    """Random weights; B of LoRA is random too (not zero), so that LoRA changes the results."""
    model = checkpoint.random_model(tiny_config(kv_heads, **llm), dtype=torch.float32, seed=seed)
    if lora:
        model.add_lora(4, 8, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.data.normal_(0, 0.1, generator=generator)
    model.set_trainable(("vision_adapter", "localization_projector", "trajectory_projector"))
    return model


def random_samples(count: int, config: PiTeConfig, seed: int = 0) -> tuple[list[TokenizedSample], list[np.ndarray]]:
    """Samples of different lengths with trajectories at some answer tokens, and their features."""
    rng = np.random.default_rng(seed)
    samples, features = [], []
    for i in range(count):
        before, after = int(rng.integers(2, 6)), int(rng.integers(8, 24))
        ids = rng.integers(3, config.llm.vocab_size, before + config.num_frames + after)
        ids[before : before + config.num_frames] = 0
        targets = np.arange(len(ids) - int(rng.integers(4, 8)), len(ids))
        placed = targets[rng.random(len(targets)) < 0.5]
        trajectory = rng.random((len(placed), config.num_points, config.num_frames, 2), dtype=np.float32)
        trajectory[rng.random(trajectory.shape[:3]) < 0.3] = ABSENT
        samples.append(TokenizedSample(f"s{i}", f"m{i}", ids, before, config.num_frames, targets, placed, trajectory))
        features.append(rng.standard_normal((config.num_frames, config.vision_feature_size)).astype(np.float32))
    return samples, features


def related_samples(
    videos: int,
    questions: int,
    config: PiTeConfig,
    *,
    head: int = 9,
    frames: int | None = None,
    turns: int = 1,
    points: int | None = None,
    seed: int = 0,
) -> tuple[list[TokenizedSample], list[np.ndarray]]:
    """Samples with one head of the prompt; `questions` about each video, which differ from their third token on.

    frames, points  1 and 1 in stage 1; None: the config's
    turns           questions and answers in a sample; the tokens of all answers are supervised
    """
    rng = np.random.default_rng(seed)
    frames = config.num_frames if frames is None else frames
    points = config.num_points if points is None else points
    beginning, after = rng.integers(3, config.llm.vocab_size, head), rng.integers(3, config.llm.vocab_size, 2)
    samples, features = [], []
    for video in range(videos):
        record = rng.standard_normal((frames, config.vision_feature_size)).astype(np.float32)
        for question in range(questions):
            ids = [*beginning, *[0] * frames, *after]
            targets: list[int] = []
            for _ in range(turns):
                ids += rng.integers(3, config.llm.vocab_size, int(rng.integers(1, 6))).tolist()
                answer = int(rng.integers(2, 9))
                targets += range(len(ids), len(ids) + answer)
                ids += rng.integers(3, config.llm.vocab_size, answer).tolist()
            placed = np.array(targets)[rng.random(len(targets)) < 0.5]
            trajectory = rng.random((len(placed), points, frames, 2), dtype=np.float32)
            trajectory[rng.random(trajectory.shape[:3]) < 0.3] = ABSENT
            name = f"v{video}q{question}"
            samples.append(
                TokenizedSample(name, f"v{video}", np.array(ids), head, frames, np.array(targets), placed, trajectory)
            )
            features.append(record)
    return samples, features


def without_trajectories(sample: TokenizedSample) -> TokenizedSample:
    return replace(sample, trajectory=sample.trajectory[:0], trajectory_positions=sample.trajectory_positions[:0])


def random_batch(count: int, config: PiTeConfig, seed: int = 0) -> PackedBatch:
    """Each sample is a segment."""
    return collate(*random_samples(count, config, seed), share=False)
