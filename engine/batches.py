"""From a step number to packed micro-batches: plan (samples), feature store (features), collator (packing)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dataloaders.records import ABSENT, TokenizedSample
from dataloaders.samples.batch import PackedBatch, collate
from dataloaders.samples.plan import BatchPlan, InOrder, computed_rows, nothing_shared, split_batch
from engine.recipes import Absent, Normalizer

if TYPE_CHECKING:
    from dataloaders.samples.dataset import StageDataset
    from dataloaders.store.features import FeatureStore


@dataclass(frozen=True)
class StepBatches:
    """One rank's share of an optimizer step. The numbers are those of the whole global batch.

    tokens   of its samples: what a trainer without padding computes
    targets  supervised tokens
    """

    micro_batches: tuple[PackedBatch, ...]
    tokens: int
    samples: int
    targets: int

    @property
    def rows(self) -> int:
        """Rows that this rank computes."""
        return sum(batch.num_rows for batch in self.micro_batches)


class StepSource:
    """The micro-batches of any step, for one rank.

    token_budget  maximum computed rows in a micro-batch
    absent        "skip": (-1, -1) has no loss; "regress": every answer token has a trajectory, -1 where none is
                  known, as in the paper's text
    normalizer    "present": the L1 sum is divided by the number of coordinates with a loss; "paper" (eq. 8): by P * N
                  for each supervised token
    share         compute what samples of a micro-batch share once
    """

    def __init__(
        self,
        dataset: StageDataset,
        plan: BatchPlan | InOrder,
        store: FeatureStore,
        *,
        token_budget: int,
        rank: int = 0,
        ranks: int = 1,
        absent: Absent = "skip",
        normalizer: Normalizer = "present",
        pin_memory: bool = False,
        share: bool = True,
    ) -> None:
        self.dataset, self.plan, self.store = dataset, plan, store
        self.token_budget, self.rank, self.ranks = token_budget, rank, ranks
        self.absent, self.normalizer, self.pin_memory = absent, normalizer, pin_memory
        self.share = share

    def step(self, step: int) -> StepBatches:
        chosen = self.plan.samples(step)
        normalizers = self.normalizers(chosen)
        bins, _ = self.split(chosen)
        # With fewer samples than micro-batches, a sample of weight 0 fills the empty one: ranks with sharded weights
        # must compute equally often.
        shortest = int(chosen[np.argmin(self.dataset.tokens[chosen])])
        nothing = (math.inf, math.inf)
        micro = tuple(
            self._pack(members, normalizers) if members else self._pack([shortest], nothing)
            for members in bins[self.rank]
        )
        tokens, targets = (int(counts[chosen].sum()) for counts in (self.dataset.tokens, self.dataset.targets))
        return StepBatches(micro, tokens, len(chosen), targets)

    def singles(self, step: int) -> Iterator[PackedBatch]:
        """This rank's samples of a step, one per batch, to find those with a non-finite loss."""
        chosen = self.plan.samples(step)
        for members in self.split(chosen)[0][self.rank]:
            for member in members:
                yield self._pack([member], self.normalizers(chosen))

    def split(self, chosen: np.ndarray) -> tuple[list[list[list[int]]], int]:
        """The samples of every rank's micro-batches, and the number of rows that they compute together, as planned.

        The collator may find a few more rows that are equal.
        """
        tokens = self.dataset.tokens[chosen]
        prefixes = self.dataset.prefixes(chosen) if self.share else nothing_shared(len(chosen))
        bins = split_batch(tokens, self.ranks, self.token_budget, prefixes)
        rows = sum(computed_rows(tokens, members, prefixes) for of_rank in bins for members in of_rank)
        return [[[int(chosen[i]) for i in members] for members in of_rank] for of_rank in bins], rows

    def normalizers(self, chosen: np.ndarray) -> tuple[float, float]:
        """Divisors of the summed cross-entropy and L1 of the whole global batch, computed before any sample is read."""
        targets = int(self.dataset.targets[chosen].sum())
        points = self.dataset.num_points * self.dataset.num_frames
        if self.normalizer == "paper":
            return targets, targets * points
        if self.absent == "regress":
            return targets, targets * points * 2
        return targets, int(self.dataset.coordinates[chosen].sum())

    def _pack(self, members: list[int], normalizers: tuple[float, float]) -> PackedBatch:
        samples = [self.dataset[i] for i in members]
        if self.absent == "regress":
            samples = [with_absent_trajectories(s) for s in samples]
        self.store.advise(s.media for s in samples)
        features = [self.store.read(s.media) for s in samples]
        batch = collate(samples, features, normalizers=normalizers, share=self.share)
        return batch.pin_memory() if self.pin_memory else batch


def with_absent_trajectories(sample: TokenizedSample) -> TokenizedSample:
    """The sample with a trajectory for every supervised token; a token without one gets absent coordinates only."""
    full = np.full((len(sample.target_positions), *sample.trajectory.shape[1:]), ABSENT, dtype=np.float32)
    full[np.searchsorted(sample.target_positions, sample.trajectory_positions)] = sample.trajectory
    return replace(sample, trajectory=full, trajectory_positions=sample.target_positions)
