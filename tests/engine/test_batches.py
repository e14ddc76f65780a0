"""The batches of a run, compared sample by sample: the number of ranks and workers and a restart change nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from dataloaders.failures import read_failures
from dataloaders.samples.batch import PackedBatch
from dataloaders.samples.dataset import StageDataset
from dataloaders.samples.plan import BatchPlan
from dataloaders.samples.prefetch import prefetch
from dataloaders.store.features import FeatureStore
from engine.batches import StepBatches, StepSource
from engine.train import main
from tests.engine.workspace import FRAMES, train_arguments

GLOBAL_BATCH, STEPS = 8, 7
Content = dict[str, bytes]
Step = tuple[int, tuple[float, float], dict[str, Content]]


@pytest.fixture(scope="module")
def dataset(workspace: Path) -> StageDataset:
    tokenizer = AutoTokenizer.from_pretrained(workspace / "llm")
    shape = {"num_frames": FRAMES, "num_points": 3, "max_length": 2048}
    store = FeatureStore(workspace / "features" / "videos")
    return StageDataset(workspace / "data", 2, tokenizer, available=store, cache=workspace / "samples", **shape)


def source(dataset: StageDataset, workspace: Path, rank: int = 0, ranks: int = 1, **options: object) -> StepSource:
    """As a separate process would make it, with its own plan and store. Samples are separate, to be compared."""
    plan = BatchPlan(len(dataset), GLOBAL_BATCH, seed=5)
    store = FeatureStore(workspace / "features" / "videos")
    options = {"token_budget": 300, "share": False, **options}
    return StepSource(dataset, plan, store, rank=rank, ranks=ranks, **options)  # type: ignore[arg-type]


def samples(batch: PackedBatch) -> Iterator[tuple[str, Content]]:
    """The arrays of every sample of a packed batch, with rows counted from the sample's own start."""
    bounds = batch.cu_seqlens.tolist()
    for name, begin, end in zip(batch.sample_ids, bounds, bounds[1:]):
        content = {
            "token_ids": batch.token_ids[begin:end].numpy().tobytes(),
            "position_ids": batch.position_ids[begin:end].numpy().tobytes(),
        }
        for rows, values in (
            (batch.feature_rows, batch.features),
            (batch.read_rows[batch.target_rows], batch.target_ids),
            (batch.read_rows[batch.trajectory_rows], batch.trajectory),
        ):
            own = (rows >= begin) & (rows < end)
            content[f"{len(content)} rows"] = (rows[own] - begin).numpy().tobytes()
            content[f"{len(content)} values"] = values[own].numpy().tobytes()
        yield name, content


def joined(shares: tuple[StepBatches, ...]) -> Step:
    """A step of all ranks together: its tokens, its normalizers and the content of every sample."""
    weighted = [b for share in shares for b in share.micro_batches if not math.isinf(b.normalizers[0])]
    contents = [pair for batch in weighted for pair in samples(batch)]
    assert len({name for name, _ in contents}) == len(contents), "no sample is computed twice"
    (normalizers,) = {tuple(batch.normalizers.tolist()) for batch in weighted}
    (tokens,) = {share.tokens for share in shares}
    return tokens, normalizers, dict(contents)  # type: ignore[return-value]


def steps(
    dataset: StageDataset, workspace: Path, start: int, stop: int, ranks: int, workers: int, **options: object
) -> list[Step]:
    sources = [source(dataset, workspace, rank, ranks, **options) for rank in range(ranks)]
    shares = zip(*(prefetch(s.step, range(start, stop), workers) for s in sources))
    return [joined(step) for step in shares]


@pytest.fixture(scope="module")
def expected(dataset: StageDataset, workspace: Path) -> list[Step]:
    return steps(dataset, workspace, 0, STEPS, ranks=1, workers=0)


def test_the_reference_run(dataset: StageDataset, expected: list[Step]) -> None:
    """Its batches hold the samples of the data set and their features, each sample once an epoch."""
    assert len(dataset) == 24 and all(len(contents) == GLOBAL_BATCH for _, _, contents in expected)
    for first in (0, 3):
        assert sorted(name for _, _, contents in expected[first : first + 3] for name in contents) == sorted(
            dataset.ids
        )
    by_name = {name: dataset[i] for i, name in enumerate(dataset.ids)}
    for tokens, (targets, coordinates), contents in expected:
        members = [by_name[name] for name in contents]
        assert tokens == sum(len(m.token_ids) for m in members)
        assert targets == sum(len(m.target_positions) for m in members)
        assert coordinates == sum(m.num_coordinates for m in members)
        assert all(contents[m.id]["token_ids"] == m.token_ids[:-1].tobytes() for m in members)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_workers(
    dataset: StageDataset, workspace: Path, expected: list[Step], ranks: int, workers: int
) -> None:
    assert steps(dataset, workspace, 0, STEPS, ranks, workers) == expected


@pytest.mark.parametrize("token_budget", [250, 2048])
def test_micro_batches(dataset: StageDataset, workspace: Path, expected: list[Step], token_budget: int) -> None:
    assert steps(dataset, workspace, 0, STEPS, 2, 2, token_budget=token_budget) == expected


@pytest.mark.parametrize(("before", "after"), [((1, 0), (4, 2)), ((4, 2), (2, 0)), ((2, 2), (1, 2)), ((2, 0), (3, 2))])
@pytest.mark.parametrize("stopped", [1, 3, 4])
def test_resumed_with_another_number_of_ranks(
    dataset: StageDataset,
    workspace: Path,
    expected: list[Step],
    before: tuple[int, int],
    after: tuple[int, int],
    stopped: int,
) -> None:
    """In the middle of an epoch, at its end and after it. Prefetched batches that were not used are made again."""
    first = source(dataset, workspace, 0, before[0])
    abandoned = prefetch(first.step, range(0, STEPS), before[1])
    for _ in range(stopped):
        next(abandoned)
    abandoned.close()
    parts = steps(dataset, workspace, 0, stopped, *before) + steps(dataset, workspace, stopped, STEPS, *after)
    assert parts == expected


def test_samples_left_out_are_listed_and_part_of_the_fingerprint(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A malformed record within the failure budget; a run that left out something else is refused."""
    data = tmp_path / "data"
    shutil.copytree(workspace / "data", data, symlinks=True)
    file = data / "stage1/localized_narratives.jsonl"
    good = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*good[:3], "{}\n", *good[3:]]))
    assert main(train_arguments(workspace, tmp_path / "out", "1", data=data, max_steps=2)) == 1
    assert "1 of 25 records are malformed, more than the failure budget of 1.00%" in capsys.readouterr().err
    flags = {"data": data, "failure_budget": 0.1, "max_steps": 2, "workers": 0}
    assert main(train_arguments(workspace, tmp_path / "out", "1", **flags)) == 0
    assert "24 samples, 24 with mentions, 24 with a trajectory, 1 malformed records left out" in capsys.readouterr().err
    (failure,) = read_failures(tmp_path / "out/stage1/left_out.jsonl")
    assert (failure.id, failure.stage) == ("stage1/localized_narratives.jsonl:4", "read")
    (saved,) = (tmp_path / "out/stage1/checkpoints").glob("*/state.json")
    assert json.loads(saved.read_text())["identity"]["left_out"]["read"] == 1
    file.write_text("".join([*good, "{}\n"]))
    assert main(train_arguments(workspace, tmp_path / "out", "1", **flags)) == 1
    assert "left_out" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sharing_changes_the_rows_and_not_the_samples(
    dataset: StageDataset, workspace: Path, expected: list[Step], ranks: int
) -> None:
    """Every sample is in one micro-batch, the head of the prompt is one segment of each, and the plan counts the rows."""
    for step, (tokens, normalizers, contents) in enumerate(expected):
        sources = [source(dataset, workspace, rank, ranks, share=True) for rank in range(ranks)]
        shares = [each.step(step) for each in sources]
        batches = [b for share in shares for b in share.micro_batches if not math.isinf(b.normalizers[0])]
        assert sorted(name for b in batches for name in b.sample_ids) == sorted(contents)
        assert {tuple(b.normalizers.tolist()) for b in batches} == {normalizers}
        assert sum(b.num_tokens for b in batches) == tokens == shares[0].tokens
        rows = sum(b.num_rows for b in batches)
        (planned,) = {each.split(each.plan.samples(step))[1] for each in sources}
        assert 0.98 * planned <= rows <= planned < tokens - GLOBAL_BATCH
        assert max(b.num_rows for b in batches) <= 300


def test_ranks_agree_on_the_number_of_micro_batches_without_communication(
    dataset: StageDataset, workspace: Path
) -> None:
    """Every rank has as many micro-batches as the others, in every step."""
    for ranks in (2, 3, 4):
        counts = [
            [len(source(dataset, workspace, rank, ranks).step(step).micro_batches) for step in range(STEPS)]
            for rank in range(ranks)
        ]
        assert np.array_equal(counts, [counts[0]] * ranks)
