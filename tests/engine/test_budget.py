"""The dry run and its arithmetic, without weights or data."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import budget
from engine.recipes import PAPER, recipe
from engine.train import main
from pite import checkpoint
from pite.config import PiTeConfig
from tests.engine.workspace import train_arguments
from tests.samples import random_batch, tiny_config


@pytest.mark.parametrize("size, lora, total", [("7b", 159.9, 6744.0), ("13b", 250.3, 13022.9)])
def test_presets_have_the_known_sizes(size, lora, total):
    count = budget.count_parameters(PiTeConfig.preset(size), recipe(size, 2))
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
        "8x A100",
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


def test_linear_parameters_are_those_of_every_projection():
    config = tiny_config(kv_heads=2)
    d, i = 64, 96
    expected = 2 * (d * d * 2 + d * 32 * 2 + 3 * d * i)
    assert budget.count_parameters(config, PAPER[2]).linear == expected


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
    count = budget.count_parameters(config, PAPER[3])
    mine = budget.step_flops(config, count.linear, batch.num_tokens, batch.target_ids.numel(), mean_length=0)
    adapter = 4 * batch.features.numel() * config.llm.hidden_size
    assert linear == pytest.approx(mine + adapter, rel=0.05)


@pytest.mark.parametrize("device", ["A100", "H200"])
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_chosen_budget_fits_and_holds_the_longest_sample(size, device):
    config = PiTeConfig.preset(size)
    count = budget.count_parameters(config, recipe(size, 2))
    tokens = budget.fitting_token_budget(config, count, budget.MEMORY[device])
    assert 2048 <= tokens <= budget.LARGEST_BUDGET
    assert budget.memory(config, count, tokens).total <= (1 - budget.SPARE) * budget.MEMORY[device]


def test_a_device_too_small_is_refused():
    config = PiTeConfig.preset("13b")
    with pytest.raises(ValueError, match="leave no room"):
        budget.fitting_token_budget(config, budget.count_parameters(config, recipe("13b", 2)), 24e9)
