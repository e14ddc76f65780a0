"""The sampler: which samples make up each optimizer step, and which rank computes which of them.

The order is a pure function of (seed, epoch). There is no iterator state, so the step number is enough to resume, and
the global batch is the same on any number of ranks. The price is an O(n) shuffle per epoch, milliseconds per 100k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
            raise ValueError(
                f"{num_samples} samples do not fill one global batch of {global_batch}: lower --global-batch"
            )
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


@dataclass(frozen=True)
class Prefixes:
    """What the samples of a global batch share, known before any of them is read.

    head    rows at the start of every sample, equal in all of them: the head of the prompt
    media   rows at the start of the samples of one group, equal in these: the head and the frames
    groups  (B,) int, the group of each sample
    """

    head: int
    media: int
    groups: np.ndarray


def nothing_shared(count: int) -> Prefixes:
    """Of `count` samples."""
    return Prefixes(0, 0, np.arange(count))


def split_batch(
    lengths: Sequence[int] | np.ndarray, ranks: int, token_budget: int, prefixes: Prefixes | None = None
) -> list[list[list[int]]]:
    """Split one global batch over ranks and micro-batches, balanced by computed rows (longest first).

    lengths       (B,) tokens of each sample; it has one row less, because its last token is not computed
    token_budget  most rows of a micro-batch
    prefixes      rows that samples of one micro-batch share; None if all rows of all samples are computed
    Returns bins[rank][micro_batch] = positions in `lengths`. Every rank has the same number of micro-batches, the
    smallest that respects the budget. Samples of one group are in one micro-batch, except a few that level the ranks.
    With fewer samples than bins some are empty. Raises ValueError if a single sample exceeds the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest = int(lengths.max(initial=0))
    if longest - 1 > token_budget:
        raise ValueError(f"a sample of {longest} tokens does not fit a micro-batch of {token_budget}")
    prefixes = prefixes or nothing_shared(len(lengths))
    pieces, weights = _pieces(lengths, prefixes, token_budget)
    micro_batches = max(1, -(-sum(weights) // ((token_budget - prefixes.head) * ranks)))
    while True:
        bins, loads = longest_first(weights, ranks * micro_batches)
        if max(loads) + prefixes.head <= token_budget:
            break
        micro_batches += 1
    filled = [[i for piece in b for i in pieces[piece]] for b in bins]
    plan = [filled[r * micro_batches : (r + 1) * micro_batches] for r in range(ranks)]
    if len(pieces) < len(lengths):
        _level(plan, lengths, token_budget, prefixes)
    return [[sorted(members) for members in rank] for rank in plan]


def computed_rows(lengths: Sequence[int] | np.ndarray, members: Sequence[int], prefixes: Prefixes) -> int:
    """Rows of a micro-batch of the samples at the positions `members`, which are computed once where they are shared.

    The collator compares what it packs, so it finds a few more equal rows where questions begin with equal words.
    """
    if not len(members):
        return 0
    own = np.asarray(lengths)[members] - 1 - prefixes.media
    groups = len(np.unique(prefixes.groups[members]))
    return prefixes.head + groups * (prefixes.media - prefixes.head) + int(own.sum())


def attended_rows(lengths: Sequence[int] | np.ndarray, members: Sequence[int], prefixes: Prefixes) -> int:
    """Rows of keys and values that attention reads for such a micro-batch: the length of its `kv_rows`.

    Divided by `computed_rows`, less one, it is the share of copies, which the memory estimate needs.
    """
    own = int((np.asarray(lengths)[members] - 1).sum())
    counts = np.unique(prefixes.groups[members], return_counts=True)[1]
    # A prefix is a segment of its own if several samples follow it.
    return own + prefixes.head * (len(counts) > 1) + prefixes.media * int((counts > 1).sum())


def _pieces(lengths: np.ndarray, prefixes: Prefixes, token_budget: int) -> tuple[list[list[int]], list[int]]:
    """The samples of each group, in several pieces where they exceed the budget, and each piece's rows below the head."""
    order = np.argsort(prefixes.groups, kind="stable")
    pieces: list[list[int]] = []
    weights: list[int] = []
    last = None
    for i, group, own in zip(
        order.tolist(), prefixes.groups[order].tolist(), (lengths[order] - 1 - prefixes.media).tolist()
    ):
        if group == last and prefixes.head + weights[-1] + own <= token_budget:
            pieces[-1].append(i)
            weights[-1] += own
        else:
            pieces.append([i])
            weights.append(prefixes.media - prefixes.head + own)
        last = group
    return pieces, weights


def _level(plan: list[list[list[int]]], lengths: np.ndarray, token_budget: int, prefixes: Prefixes) -> None:
    """Move samples of one group at a time from the rank with most rows to the one with fewest, while that helps.

    A group is the heavier the more samples it has, so whole groups leave the ranks uneven.
    """

    def rows(members: list[int]) -> int:
        return computed_rows(lengths, members, prefixes)

    for _ in range(4 * len(plan)):
        loads = [sum(map(rows, rank)) for rank in plan]
        heavy, light = int(np.argmax(loads)), int(np.argmin(loads))
        source, target = max(plan[heavy], key=rows), min(plan[light], key=rows)
        room = min((loads[heavy] - loads[light] - prefixes.media) // 2, token_budget - rows(target) - prefixes.media)
        moved = _most_rows(source, lengths - 1 - prefixes.media, room, prefixes.groups)
        kept = [i for i in source if i not in moved]
        if not moved or loads[light] + rows(target + moved) - rows(target) >= loads[heavy]:
            return
        source[:] = kept
        target.extend(moved)


def _most_rows(members: list[int], own: np.ndarray, room: int, groups: np.ndarray) -> list[int]:
    """Samples of one group with as many own rows as fit in `room`, taken in order."""
    best: list[int] = []
    for group in np.unique(groups[members]):
        taken: list[int] = []
        for i in members:
            if groups[i] == group and own[[*taken, i]].sum() <= room:
                taken.append(i)
        best = max(best, taken, key=lambda samples: own[samples].sum())
    return best
