"""Divide work of unequal size into shares of nearly equal size: samples among micro-batches, videos among ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def longest_first(weights: Sequence[float] | np.ndarray, num_bins: int) -> tuple[list[list[int]], list[float]]:
    """Greedy number partitioning (Graham 1969): each item, heaviest first, goes to the bin with the least load.

    weights  (n,) integers or floats, 0 or more. Of equal weights the first comes first; of equal loads the first bin is
             taken
    Returns the items of each bin as positions in `weights`, in the order in which they were assigned, and each bin's
    load.
    """
    weights = np.asarray(weights)
    values: list[float] = weights.tolist()
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads: list[float] = [0] * num_bins
    heap = [(loads[b], b) for b in range(num_bins)]
    for i in np.argsort(-weights, kind="stable").tolist():
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        loads[b] = load + values[i]
        heapq.heappush(heap, (loads[b], b))
    return bins, loads
