"""How much of a stage's samples is shared, and therefore computed once: for the memory estimate and the dry run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dataloaders.samples.dataset import StageDataset
from dataloaders.samples.plan import BatchPlan, Prefixes, attended_rows, computed_rows, split_batch

PROMPT_HEAD = 35
"""Tokens of Vicuna's prompt before the frames, equal in all samples."""

COUNTED_STEPS = 100
"""Number of global batches that are counted."""


@dataclass(frozen=True)
class Lengths:
    """The samples of a global batch before they are read: tokens (B,), supervised tokens together, common prefixes."""

    tokens: np.ndarray
    targets: int
    prefixes: Prefixes


@dataclass(frozen=True)
class Sharing:
    """Means over the micro-batches of some steps.

    computed  computed rows per sample token
    read      rows that a head reads, per computed row
    copied    copies of shared rows' keys and values, per computed row
    filled    computed rows over the token budget of all micro-batches
    """

    computed: float
    read: float
    copied: float
    filled: float


def lengths_of(dataset: StageDataset, plan: BatchPlan, steps: int = COUNTED_STEPS) -> list[Lengths]:
    """The lengths of the first global batches of a stage, up to one epoch."""
    found = []
    for step in range(min(steps, plan.steps_per_epoch)):
        chosen = plan.samples(step)
        found.append(Lengths(dataset.tokens[chosen], int(dataset.targets[chosen].sum()), dataset.prefixes(chosen)))
    return found


def count_sharing(batches: Iterable[Lengths], ranks: int, token_budget: int) -> Sharing:
    """Plan the micro-batches and count. Raises ValueError if a sample exceeds the budget."""
    tokens = rows = targets = attended = micro_batches = 0
    for batch in batches:
        bins = split_batch(batch.tokens, ranks, token_budget, batch.prefixes)
        filled = [members for of_rank in bins for members in of_rank if members]
        micro_batches += sum(map(len, bins))
        tokens, targets = tokens + int(batch.tokens.sum()), targets + batch.targets
        rows += sum(computed_rows(batch.tokens, members, batch.prefixes) for members in filled)
        attended += sum(attended_rows(batch.tokens, members, batch.prefixes) for members in filled)
    return Sharing(rows / tokens, min(1.0, targets / rows), attended / rows - 1, rows / (micro_batches * token_budget))


def assume_sharing(
    tokens: float, targets: float, samples: float, video: float = 0.0, videos: float | None = None
) -> Sharing:
    """For data that are not on disk: means per sample, and the samples of a micro-batch, which share the prompt's head.

    video   rows of a video that its questions share too; 0 if they do not, or are in other batches
    videos  which the samples of the micro-batch are about; another one for each unless given
    """
    videos = samples if videos is None else min(samples, videos)
    rows = tokens - 1 - PROMPT_HEAD * (1 - 1 / samples) - video * (1 - videos / samples)
    copied = (PROMPT_HEAD + (video if videos < samples else 0.0)) / rows
    return Sharing(rows / tokens, min(1.0, targets / rows), copied, 1.0)
