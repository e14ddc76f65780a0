"""What sharing prefixes saves of a training step on a CPU: at least 85% of the rows that it saves by count.

The last token and the rows that no head reads are left out in both steps. Only the shared prefixes are switched.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from bench.measure import cpu_clock
from dataloaders.records import TokenizedSample
from dataloaders.samples.batch import PackedBatch, collate
from engine.distributed.gradients import Gradients
from engine.loop import backward_order, compute_losses, make_optimizer
from engine.recipes import PAPER, Stage
from pite import checkpoint
from pite.config import PiTeConfig
from pite.model import PiTe

ROUNDS = 15
SHARE = 0.85
HEAD = 35
FRAMES = 100

LAYOUTS: dict[str, tuple[Stage, int, int, int, int]] = {
    "stage 1": (1, 24, 1, 24, 55),
    "stage 2": (2, 12, 1, 15, 65),
    "stage 3, grouped": (3, 2, 8, 34, 90),
}
"""Stage, media, questions about each, tokens of a question, mean tokens of an answer."""


def make_samples(name: str, vocabulary: int) -> tuple[list[TokenizedSample], list[np.ndarray]]:
    """Samples whose parts have the lengths of the papers' data sets; answers are gamma-distributed."""
    stage, media, questions, question, answer = LAYOUTS[name]
    rng = np.random.default_rng(0)
    frames, points = (1, 1) if stage == 1 else (FRAMES, 3)
    head = rng.integers(3, vocabulary, HEAD)
    samples, features = [], []
    for m in range(media):
        record = rng.standard_normal((frames, 64)).astype(np.float32)
        for q in range(questions):
            length = 8 + int(rng.gamma(2.0, (answer - 8) / 2))
            newline_and_rest = np.concatenate([[13], rng.integers(3, vocabulary, question - 1 + length)])
            ids = np.concatenate([head, np.zeros(frames, np.int64), newline_and_rest])
            targets = np.arange(len(ids) - length, len(ids))
            placed = targets[rng.random(length) < (0.4 if stage < 3 else 0)]
            trajectory = rng.random((len(placed), points, frames, 2), dtype=np.float32)
            samples.append(TokenizedSample(f"{m}.{q}", f"{m}", ids, HEAD, frames, targets, placed, trajectory))
            features.append(record)
    return samples, features


def make_model(vocabulary: int, stage: Stage) -> PiTe:
    llm = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, vocab_size=vocabulary
    )
    torch.manual_seed(0)
    config = PiTeConfig(llm, num_frames=FRAMES, num_points=3, vision_feature_size=64)
    model = checkpoint.random_model(config, dtype=torch.float32)
    model.add_lora(16, 32.0)
    model.set_trainable(PAPER[stage].trainable_modules)
    return model


def make_step(model: PiTe, batch: PackedBatch, stage: Stage) -> Callable[[], None]:
    optimizer, gradients = make_optimizer(model, PAPER[stage]), Gradients(backward_order(model), 1)

    def step() -> None:
        compute_losses(model, batch, PAPER[stage]).total.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in model.trainable()], 1.0)
        optimizer.step()
        gradients.zero()

    return step


def measure(name: str, vocabulary: int, rounds: int) -> tuple[float, float, list[float]]:
    """Ratio of rows, median ratio of samples per second, and its sorted values."""
    stage = LAYOUTS[name][0]
    samples = make_samples(name, vocabulary)
    batches = [collate(*samples, share=share) for share in (False, True)]
    steps = [make_step(make_model(vocabulary, stage), batch, stage) for batch in batches]
    clock, ratios = cpu_clock(), []
    for round_ in range(rounds + 1):
        seconds = {}
        for i in (0, 1) if round_ % 2 else (1, 0):
            start = clock()
            steps[i]()
            seconds[i] = clock() - start
        ratios.append(seconds[0] / seconds[1])
    ratios = sorted(ratios[1:])  # the first round is the warm-up
    return batches[0].num_rows / batches[1].num_rows, median(ratios), ratios


@pytest.mark.parametrize(("name", "vocabulary"), [*((name, 4000) for name in LAYOUTS), ("stage 2", 32000)])
def test_the_step_is_faster_by_the_rows_that_are_saved(name: str, vocabulary: int, capsys: Any) -> None:
    counted, measured, ratios = measure(name, vocabulary, ROUNDS)
    with capsys.disabled():
        print(
            f"\n{name}, vocabulary {vocabulary:,}: samples/s x{measured:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), "
            f"rows x{counted:.3f}: {measured / counted:.1%}"
        )
    # Sharing does not save rows of the vocabulary head, so a large vocabulary has less to gain; it is only reported.
    assert vocabulary > 4000 or measured >= SHARE * counted
