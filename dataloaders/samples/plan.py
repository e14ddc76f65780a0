"""The sampler: which samples make up each optimizer step, and which rank computes which of them.

The order is a pure function of (seed, epoch). There is no iterator state, so the step number is enough to resume, and
the global batch is the same on any number of ranks. The price is an O(n) shuffle per epoch, milliseconds per 100k.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dataloaders.partition import longest_first


class BatchPlan:
    """The sequence of global batches of a training run.

    num_samples   samples in the data set; each epoch visits floor(n / global_batch) * global_batch of them
    global_batch  samples per optimizer step, over all ranks and micro-batches
    seed          of the shuffle
    groups        (n,) int or None; samples of one group stay next to each other in every epoch, so that, for
                  instance, two questions about one video are in one batch
    Raises ValueError if the data set holds fewer samples than one batch.
    """

    def __init__(self, num_samples: int, global_batch: int, seed: int, groups: np.ndarray | None = None) -> None:
        if global_batch < 1:
            raise ValueError(f"the global batch must be at least 1, not {global_batch}")
        if num_samples < global_batch:
            raise ValueError(f"{num_samples} samples do not fill one global batch of {global_batch}")
        if groups is not None and len(groups) != num_samples:
            raise ValueError(f"{len(groups)} group labels for {num_samples} samples")
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self._groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
        self._order = lru_cache(maxsize=2)(self._shuffle)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def left_over(self) -> int:
        """Samples in the last incomplete batch, which is dropped; different ones in each epoch."""
        return self.num_samples % self.global_batch

    def samples(self, step: int) -> np.ndarray:
        """Indices (global_batch,) of the samples of optimizer step `step`, which counts from 0 over all epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch
        return self._order(epoch)[start : start + self.global_batch]

    def _shuffle(self, epoch: int) -> np.ndarray:
        # Raw Philox output is the same in every NumPy release, which Generator.permutation does not promise.
        bits = np.random.Philox(key=np.array([self.seed % 2**64, epoch], dtype=np.uint64))
        within = bits.random_raw(self.num_samples)
        if self._groups is None:
            return np.argsort(within, kind="stable")
        between = bits.random_raw(int(self._groups.max()) + 1)[self._groups]
        return np.lexsort((within, self._groups, between))


class InOrder:
    """The plan of a validation: one pass over all samples, in order; the last batch may be smaller."""

    def __init__(self, num_samples: int, batch: int) -> None:
        self.num_samples, self.batch = num_samples, batch

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch)

    def samples(self, step: int) -> np.ndarray:
        """Indices of the samples of a batch, which counts from 0."""
        return np.arange(step * self.batch, min((step + 1) * self.batch, self.num_samples))


def split_batch(lengths: Sequence[int] | np.ndarray, ranks: int, token_budget: int) -> list[list[list[int]]]:
    """Split one global batch over ranks and micro-batches, balanced by token count (longest first).

    lengths       (B,) tokens of each sample
    token_budget  most tokens of a micro-batch
    Returns bins[rank][micro_batch] = positions in `lengths`. Every rank has the same number of micro-batches, the
    smallest that respects the budget. With fewer samples than bins some are empty. Raises ValueError if a single sample
    exceeds the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest = int(lengths.max(initial=0))
    if longest > token_budget:
        raise ValueError(f"a sample of {longest} tokens does not fit a micro-batch of {token_budget}")
    micro_batches = max(1, -(-int(lengths.sum()) // (token_budget * ranks)))
    while True:
        bins, loads = longest_first(lengths, ranks * micro_batches)
        if max(loads) <= token_budget:
            return [[sorted(b) for b in bins[r * micro_batches : (r + 1) * micro_batches]] for r in range(ranks)]
        micro_batches += 1
