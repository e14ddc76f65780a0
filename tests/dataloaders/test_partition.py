"""Greedy partitioning: a pinned assignment, ties by position, and loads within Graham's bound."""

import numpy as np
import pytest

from dataloaders.partition import longest_first


@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
def test_the_assignment_is_pinned(kind):
    """Of equal weights the first comes first; of equal loads the first bin is taken."""
    assert longest_first(kind([3, 5, 3, 1, 5]), 2) == ([[1, 0, 3], [4, 2]], [9, 8])
    assert longest_first(kind([0.5, 2.5, 0.5]), 3) == ([[1], [0], [2]], [2.5, 0.5, 0.5])


def test_more_bins_than_items_leave_empty_bins():
    assert longest_first([7], 3) == ([[0], [], []], [7, 0, 0])
    assert longest_first([], 2) == ([[], []], [0, 0])


@pytest.mark.parametrize("num_bins", [1, 3, 8])
def test_loads_are_the_sums_of_their_items_and_nearly_equal(num_bins):
    """Graham (1969): the largest load is at most 4/3 of the optimum, at least the mean and the largest weight."""
    weights = np.random.default_rng(num_bins).integers(1, 1000, 100)
    bins, loads = longest_first(weights, num_bins)
    assert sorted(i for items in bins for i in items) == list(range(100))
    assert loads == [int(weights[items].sum()) for items in bins]
    assert max(loads) <= 4 / 3 * max(weights.sum() / num_bins, weights.max())
