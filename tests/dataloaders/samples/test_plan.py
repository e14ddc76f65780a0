"""The batch plan: a pure function of seed and step, the same on any number of ranks, balanced."""

import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from dataloaders.samples.batch import collate
from dataloaders.samples.plan import BatchPlan, Prefixes, attended_rows, computed_rows, nothing_shared, split_batch
from tests.samples import related_samples, tiny_config


def test_an_epoch_visits_each_sample_once_and_epochs_differ():
    plan = BatchPlan(100, 10, seed=3)
    epochs = [np.concatenate([plan.samples(e * 10 + s) for s in range(10)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(*epochs)


def test_the_dropped_samples_differ_in_each_epoch():
    plan = BatchPlan(103, 10, seed=3)
    assert (plan.steps_per_epoch, plan.left_over) == (10, 3)
    unseen = [set(range(103)).difference(*(plan.samples(e * 10 + s).tolist() for s in range(10))) for e in range(3)]
    assert [len(u) for u in unseen] == [3, 3, 3]
    assert not set.intersection(*unseen)


def test_samples_depend_on_seed_and_step_alone():
    forwards = BatchPlan(57, 8, seed=1)
    order = [forwards.samples(s).tolist() for s in range(20)]
    backwards = BatchPlan(57, 8, seed=1)
    assert [backwards.samples(s).tolist() for s in reversed(range(20))] == order[::-1]
    assert BatchPlan(57, 8, seed=2).samples(0).tolist() != order[0]


def test_the_order_is_pinned():
    """If this sequence changes, a run that resumes after the change trains on other batches."""
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


GROUPS = np.random.default_rng(0).integers(0, 35, 256)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("budget", [2048, 4096, 16384])
def test_samples_of_a_group_are_computed_together(ranks, budget):
    """As in stage 3 with 7.5 questions a video: a tenth of the prefixes at most is computed on several ranks."""
    lengths = np.random.default_rng(ranks).integers(180, 340, 256)
    prefixes = Prefixes(35, 135, GROUPS)
    bins = split_batch(lengths, ranks, budget, prefixes)
    assert sorted(i for rank in bins for micro in rank for i in micro) == list(range(256))
    rows = [[computed_rows(lengths, micro, prefixes) for micro in rank] for rank in bins]
    assert max(map(max, rows)) <= budget
    separate = int((lengths - 1).sum())
    assert sum(map(sum, rows)) <= 0.75 * separate
    loads = [sum(rank) for rank in rows]
    assert max(loads) <= 1.06 * np.mean(loads)


def test_computed_rows_counts_what_is_shared_once():
    prefixes = Prefixes(3, 8, np.array([0, 1, 0]))
    assert computed_rows([10, 12, 14], [0, 1, 2], prefixes) == 3 + 2 * 5 + (1 + 3 + 5)
    assert computed_rows([10, 12, 14], [0], prefixes) == 9
    assert computed_rows([10, 12, 14], [], prefixes) == 0
    assert computed_rows([10, 12, 14], [0, 1, 2], nothing_shared(3)) == 33


@pytest.mark.parametrize(("videos", "questions"), [(1, 1), (6, 1), (1, 4), (3, 4)])
def test_the_counted_rows_are_those_of_the_packed_batch(videos, questions):
    """Where questions follow two equal tokens, the collator finds those too."""
    samples, features = related_samples(videos, questions, tiny_config())
    batch = collate(samples, features)
    lengths = [len(s.token_ids) for s in samples]
    prefixes = Prefixes(9, 9 + 8 + (2 if questions > 1 else 0), np.arange(videos).repeat(questions))
    everything = range(len(samples))
    assert computed_rows(lengths, everything, prefixes) == batch.num_rows
    keys = batch.num_rows if batch.kv_rows is None else len(batch.kv_rows)
    assert attended_rows(lengths, everything, prefixes) == keys


def test_a_group_larger_than_the_budget_is_divided():
    bins = split_batch([50] * 8, 1, 64, Prefixes(5, 20, np.zeros(8, dtype=int)))
    assert sorted(len(micro) for micro in bins[0]) == [1] * 8


def test_a_sample_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="300 tokens"):
        split_batch([10, 300], 2, token_budget=256)


@pytest.mark.parametrize(
    ("stage", "mean"), [(1, 55.0), (2, 65.0), (3, 90.0)], ids=["narratives", "PiTe-143k", "instructions"]
)
def test_balance_on_answers_with_a_long_tail(stage: int, mean: float):
    """Answers of log-normal length around a stage's mean, one in a hundred as long as the sequence allows."""
    rng = np.random.default_rng(stage)
    fixed = 60 if stage == 1 else 150
    imbalance = []
    for _ in range(50):
        answers = rng.lognormal(np.log(mean), 0.7, 256).astype(int)
        answers[rng.random(256) < 0.01] = 2048 - fixed
        lengths = (fixed + answers).clip(max=2048)
        loads = [sum(lengths[i] for micro in rank for i in micro) for rank in split_batch(lengths, 8, 16384)]
        imbalance.append(max(loads) / np.mean(loads) - 1)
    assert max(imbalance) <= 0.02


@pytest.mark.parametrize("groups", [None, np.arange(10**6) // 2], ids=["alone", "in groups"])
def test_a_million_samples_take_seconds_and_megabytes(groups: np.ndarray | None):
    """Start an epoch of 3,906 batches. Its order stays in memory (8 MB), and the groups need as much."""
    tracemalloc.start()
    start = time.process_time()
    plan = BatchPlan(10**6, 256, seed=0, groups=groups)
    plan.samples(0)
    begun = time.process_time() - start
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    seen = np.zeros(10**6, dtype=np.uint8)
    for step in range(plan.steps_per_epoch):
        seen[plan.samples(step)] += 1
    assert seen.sum() == 3906 * 256 and seen.max() == 1
    assert begun < 5 and kept < (10e6 if groups is None else 20e6) and peak < 80e6


def test_all_processes_compute_the_same_plan():
    """Ranks do not exchange the plan: processes with different hash seeds compute the same samples."""
    code = (
        "import numpy as np, hashlib; from dataloaders.samples.plan import BatchPlan, split_batch; "
        "lengths = np.random.default_rng(0).integers(100, 2000, 5000); h = hashlib.sha256(); "
        "p = BatchPlan(5000, 64, 7, np.arange(5000) // 3); "
        "[h.update(repr(split_batch(lengths[p.samples(s)], 8, 4096)).encode() + p.samples(s).tobytes()) "
        "for s in range(0, 300, 7)]; print(h.hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(outputs) == 1 and len(outputs.pop().strip()) == 64
