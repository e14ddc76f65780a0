"""The dry run and its arithmetic, without weights or data."""

import json
import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import budget
from engine.memory import count_parameters
from engine.recipes import PAPER, recipe
from engine.train import main
from pite import checkpoint
from pite.config import PiTeConfig
from tests.engine.workspace import train_arguments
from tests.samples import random_batch, tiny_config


@pytest.mark.parametrize("size, lora, total", [("7b", 159.9, 6744.0), ("13b", 250.3, 13022.9)])
def test_presets_have_the_known_sizes(size, lora, total):
    count = count_parameters(PiTeConfig.preset(size), recipe(size, 2))
    assert count.lora / 1e6 == pytest.approx(lora, abs=0.05)
    assert count.total / 1e6 == pytest.approx(total, abs=0.05)
    hidden = PiTeConfig.preset(size).llm.hidden_size
    assert count.heads == 600 * (hidden + 1)


def test_the_dry_run_needs_neither_weights_nor_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "13b", "--stage", "all", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "LoRA 250.3 M",
        "13,022.9 M",
        "143,640 samples",
        "assumed, not measured",
        "A100-40GB",
        "sharded (FSDP2)",
        "the paper took about 17 h",
        "arithmetic floor",
        "micro-batch",
    ):
        assert expected in printed
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_counts_data_that_is_there(workspace, tmp_path, capsys):
    assert main([*train_arguments(workspace, tmp_path, "2"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "24 samples" in printed
    assert "counted" in printed
    assert "6 of 8 samples" in printed
    assert "attention       by sdpa on this machine (a CPU, torch.float32)" in printed
    # 24 samples in three batches of eight, one a device: each fills its own share of 600 tokens.
    (mean,) = {int(n) for n in re.findall(r"samples, (\d+) tokens", printed)}
    assert {int(n) for n in re.findall(r"600 tokens a micro-batch, (\d+)% full", printed)} == {round(mean / 6)}


def test_micro_batches_are_as_full_as_the_samples_make_them():
    batches = [np.array([60, 40, 30, 70]), np.array([100, 100, 100, 100])]
    assert budget.fullness(batches, ranks=1, token_budget=100) == pytest.approx(600 / 600)
    assert budget.fullness(batches, ranks=2, token_budget=250) == pytest.approx(600 / (4 * 250))
    assert budget.fullness(batches, ranks=8, token_budget=100) == pytest.approx(600 / (16 * 100))
    with pytest.raises(ValueError, match="100 tokens does not fit a micro-batch of 80"):
        budget.fullness(batches, ranks=2, token_budget=80)


def test_linear_parameters_are_those_of_every_projection():
    config = tiny_config(kv_heads=2)
    d, i = 64, 96
    expected = 2 * (d * d * 2 + d * 32 * 2 + 3 * d * i)
    assert count_parameters(config, PAPER[2]).linear == expected


def test_flops_are_those_that_torch_counts():
    """4N a token and the heads, against PyTorch's own counter; attention it counts without the causal half."""
    config = tiny_config()
    model = checkpoint.random_model(config, dtype=torch.float32)
    model.vision_adapter.requires_grad_(True)
    batch = random_batch(3, config)
    with FlopCounterMode(display=False) as counter:
        model(batch).total.backward()
    counted = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in counted.items() if "mm" in str(op))
    count = count_parameters(config, PAPER[3])
    mine = budget.step_flops(config, count.linear, batch.num_tokens, batch.target_ids.numel(), mean_length=0)
    adapter = 4 * batch.features.numel() * config.llm.hidden_size
    assert linear == pytest.approx(mine + adapter, rel=0.05)


def test_a_measured_step_replaces_the_assumption(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"model": "7b", "implementation": "pite", "mfu": 0.5},
        {"model": "7b", "implementation": "pite", "mfu": 0.25},
        {"model": "7b", "implementation": "hf", "mfu": 0.9},
    ]
    content = {"environment": {"device": "NVIDIA H200"}, "rows": rows}
    (tmp_path / "step_NVIDIA_H200.json").write_text(json.dumps(content))
    monkeypatch.setattr(budget, "RESULTS", tmp_path)
    assert budget.measured_mfu("7b", "H200", tmp_path) == 0.5
    assert budget.measured_mfu("13b", "H200", tmp_path) is None
    assert budget.measured_mfu("7b", "H100", tmp_path) is None
    assert budget.main(["--model", "7b", "--stage", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["at 50% of the bfloat16 peak (measured)" in line for line in lines if " H200 " in line] == [True]
    assert ["assumed, not measured" in line for line in lines if " H100 " in line] == [True]
