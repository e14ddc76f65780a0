"""Counts of what samples share: as planned, as collated, in the metrics, and for questions about one video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataloaders.samples.plan import BatchPlan, Prefixes
from dataloaders.store.features import FeatureStore
from engine.batches import StepSource
from engine.metrics import read_metrics
from engine.sharing import PROMPT_HEAD, Lengths, assume_sharing, count_sharing, lengths_of
from engine.train import main
from tests.engine.test_validation import dataset
from tests.engine.workspace import train_arguments


def test_counts_are_those_of_the_collated_batches(workspace: Path):
    """With and without the questions about one video in one batch."""
    samples, store = dataset(workspace, 3), FeatureStore(workspace / "features" / "videos")
    computed = {}
    for grouped in (False, True):
        plan = BatchPlan(len(samples), 16, 0, samples.groups if grouped else None)
        source = StepSource(samples, plan, store, token_budget=600)
        steps = [source.step(step) for step in range(plan.steps_per_epoch)]
        batches = [batch for step in steps for batch in step.micro_batches]
        tokens, rows = (sum(getattr(b, name) for b in batches) for name in ("num_tokens", "num_rows"))
        attended = sum(b.num_rows if b.kv_rows is None else len(b.kv_rows) for b in batches)
        found = count_sharing(lengths_of(samples, plan), 1, 600)
        # The collator finds more equal rows where questions begin with equal words, as those of the synthetic world do.
        assert rows / tokens <= found.computed <= rows / tokens + 0.06
        assert (1 + found.copied) * found.computed == pytest.approx(attended / tokens, rel=0.05)
        assert sum(step.rows for step in steps) == rows and sum(step.tokens for step in steps) == tokens
        assert found.filled == pytest.approx(rows / (len(batches) * 600), rel=0.1)
        computed[grouped] = found.computed
    assert computed[True] < computed[False] < 1


def test_counts_by_hand():
    """Four samples with a head of 3 and frames of 2; two are about one video."""
    prefixes = Prefixes(3, 5, np.array([0, 0, 1, 2]))
    batch = Lengths(np.array([11, 9, 10, 10]), 8, prefixes)
    found = count_sharing([batch], 1, 100)
    # 3 of the head, 2 of each video, and 5, 3, 4, 4 of the samples without their last token.
    assert found.computed == (3 + 6 + 5 + 3 + 4 + 4) / 40
    assert found.read == 8 / 25
    # The head once and before each segment below it, the frames of the shared video before its two samples.
    assert found.copied == (25 + 3 * 3 + 2 * 5 - 2 * 0) / 25 - 1
    assert found.filled == 25 / 100
    with pytest.raises(ValueError, match="11 tokens does not fit a micro-batch of 9"):
        count_sharing([batch], 1, 9)


def test_the_assumption_is_a_prompt_without_its_head():
    found = assume_sharing(115, 55, 32)
    rows = 114 - PROMPT_HEAD * 31 / 32
    assert (found.computed, found.read, found.copied) == (rows / 115, 55 / rows, PROMPT_HEAD / rows)
    assert assume_sharing(115, 55, 1).computed == 114 / 115, "one sample shares nothing"


def test_metrics_have_both_counts(workspace: Path, tmp_path: Path, capsys):
    for name, flag in (("grouped", []), ("apart", ["--no-group-media"])):
        arguments = train_arguments(workspace, tmp_path / name, "3", llm="random", max_steps=2, global_batch=16)
        assert main([*arguments, *flag]) == 0
    assert "of the samples' tokens are computed, the others are shared" in capsys.readouterr().err
    shares = {}
    for name in ("grouped", "apart"):
        lines = read_metrics(tmp_path / name / "stage3" / "metrics.jsonl")
        for line in lines:
            assert line["rows"] < line["tokens"]
            assert line["samples_per_second"] == pytest.approx(16 / line["seconds"])
        shares[name] = sum(line["rows"] for line in lines) / sum(line["tokens"] for line in lines)
    assert shares["grouped"] < shares["apart"], "the recipe of the tiny model groups"


def test_grouping_is_part_of_the_run(workspace: Path, tmp_path: Path, capsys):
    arguments = train_arguments(workspace, tmp_path, "3", llm="random", max_steps=2)
    assert main(arguments) == 0
    assert main([*arguments, "--no-group-media"]) == 1
    assert "recipe.group_media was True there and is False now" in capsys.readouterr().err


def test_the_dry_run_counts_both(workspace: Path, tmp_path: Path, capsys):
    assert main([*train_arguments(workspace, tmp_path, "3"), "--dry-run", "--devices", "1"]) == 0
    printed = capsys.readouterr().out
    assert "of the tokens: what samples share is computed once" in printed
    assert "4N per computed row" in printed
