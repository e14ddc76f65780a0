"""The batch plan: a pure function of seed and step, the same on any number of ranks, balanced."""

import time

import numpy as np
import pytest

from dataloaders.plan import BatchPlan, split_batch


def test_an_epoch_visits_each_sample_once_and_epochs_differ():
    plan = BatchPlan(100, 10, seed=3)
    epochs = [np.concatenate([plan.samples(e * 10 + s) for s in range(10)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(*epochs)


def test_samples_depend_on_seed_and_step_alone():
    forwards = BatchPlan(57, 8, seed=1)
    order = [forwards.samples(s).tolist() for s in range(20)]
    backwards = BatchPlan(57, 8, seed=1)
    assert [backwards.samples(s).tolist() for s in reversed(range(20))] == order[::-1]
    assert BatchPlan(57, 8, seed=2).samples(0).tolist() != order[0]


def test_the_order_is_pinned():
    """A change of this sequence changes every run that is resumed across it."""
    assert BatchPlan(10, 5, seed=0).samples(0).tolist() == [0, 2, 9, 1, 8]


def test_groups_stay_together():
    groups = np.repeat(np.arange(50), 2)
    plan = BatchPlan(100, 10, seed=0, groups=groups)
    seen = []
    for step in range(10):
        batch = groups[plan.samples(step)]
        assert sorted(np.bincount(batch)[np.unique(batch)]) == [2] * 5
        seen.extend(plan.samples(step))
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize("samples, batch", [(3, 4), (0, 1), (5, 0)])
def test_a_batch_that_cannot_be_filled_is_refused(samples, batch):
    with pytest.raises(ValueError, match="batch"):
        BatchPlan(samples, batch, seed=0)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_sample_is_in_one_bin_within_the_budget(ranks):
    lengths = np.random.default_rng(ranks).integers(100, 2048, 256)
    bins = split_batch(lengths, ranks, token_budget=16384)
    assert len(bins) == ranks
    assert len({len(rank) for rank in bins}) == 1
    assert sorted(i for rank in bins for micro in rank for i in micro) == list(range(256))
    assert max(lengths[micro].sum() for rank in bins for micro in rank) <= 16384


def test_the_heaviest_of_eight_ranks_is_within_two_percent():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = 110 + rng.gamma(2.0, 60.0, 256).astype(int)
        loads = [sum(lengths[i] for micro in rank for i in micro) for rank in split_batch(lengths, 8, 16384)]
        assert max(loads) <= 1.02 * np.mean(loads)


def test_a_sample_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="300 tokens"):
        split_batch([10, 300], 2, token_budget=256)


def test_a_million_samples_are_shuffled_in_seconds():
    plan = BatchPlan(10**6, 256, seed=0, groups=np.arange(10**6) // 2)
    start = time.process_time()
    plan.samples(0)
    assert time.process_time() - start < 10
