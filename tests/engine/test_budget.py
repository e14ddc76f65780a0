"""The dry run and its arithmetic, without weights or data."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dataloaders.samples.plan import BatchPlan, Prefixes
from engine import hardware
from engine.budget import __main__ as budget
from engine.budget import scaling
from engine.budget.costs import VIT_L_14, stage_cost, step_flops
from engine.config import DataConfig, ModelConfig, OptimizationConfig, TrainConfig
from engine.layout import count_parameters
from engine.recipes import PAPER, recipe
from engine.sharing import PROMPT_HEAD, Lengths, count_sharing
from engine.train import main
from pite import checkpoint
from pite.config import PiTeConfig
from pite.towers import frame_flops
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
        "sharded over 8 (FSDP2)",
        "the paper took about 17 h",
        "1.05 h on 8x A100 at 100% of the peak, 1.46 h with the features",
        "samples over length not known",
        "micro-batch",
    ):
        assert expected in printed
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_counts_data_that_is_there(workspace, tmp_path, capsys):
    assert main([*train_arguments(workspace, tmp_path, "2"), "--dry-run", "--devices", "8"]) == 0
    printed = capsys.readouterr().out
    assert "24 samples" in printed
    assert "counted" in printed
    assert "6 of 8 samples" in printed
    assert "none of more than 2,048 tokens" in printed
    assert "attention       by sdpa on this machine (a CPU, torch.float32)" in printed
    # 24 samples in three batches of eight, one sample per device: each fills a part of its device's 600 tokens.
    (mean,) = {int(n) for n in re.findall(r"samples, (\d+) tokens", printed)}
    assert {int(n) for n in re.findall(r"600 rows a micro-batch, (\d+)% full", printed)} == {round(mean / 6)}


def test_the_help_is_its_own(capsys):
    with pytest.raises(SystemExit):
        budget.main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m engine.budget ")
    assert "Estimate parameters, tokens, FLOPs" in printed and "Train PiTe" not in printed


def test_only_rank_0_prints_the_dry_run(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert budget.main(["--stage", "2"]) == 0
    assert capsys.readouterr().out == ""


def test_each_number_of_devices_has_a_layout_of_its_own(capsys):
    """For 13B one 40 GB device needs activation checkpointing in most layers, where eight devices shard the weights."""
    assert budget.main(["--model", "13b", "--stage", "2", "--devices", "1", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    alone, eight = (next(line for line in lines if f"{n}x A100-40GB" in line) for n in (1, 8))
    assert "activation checkpointing in 32 of 40 layers" in alone and "sharded" not in alone
    assert "sharded over 8 (FSDP2), no activation checkpointing" in eight
    hours = [float(line.split()[2]) for line in (alone, eight)]
    assert hours[0] / hours[1] == pytest.approx(8 * (1 + 0.5 * 32 / 40), rel=0.01)


def test_flags_reach_the_dry_run(tmp_path, capsys):
    def printed(*flags: str) -> str:
        assert budget.main(["--stage", "2", "--devices", "8", *flags]) == 0
        return capsys.readouterr().out

    usual = printed()
    assert "adapter and heads 2.5 M" in usual and "adapter and heads 4.1 M" in printed("--num-points", "5")
    assert "    27.0   " in printed("--dtype", "float32") and "    27.0   " not in usual, "weights in float32"
    tiny_config().save(tmp_path)
    assert f"({tmp_path})" in printed("--llm", str(tmp_path))
    assert budget.main(["--stage", "2", "--llm", "owner/never-fetched"]) == 1
    assert "neither a directory nor in the Hugging Face cache" in capsys.readouterr().err


def test_linear_parameters_count_every_projection():
    config = tiny_config(kv_heads=2)
    d, i = 64, 96
    expected = 2 * (d * d * 2 + d * 32 * 2 + 3 * d * i)
    assert count_parameters(config, PAPER[2]).linear == expected


def test_flops_equal_torchs_count():
    """4N a row and the heads, against PyTorch's counter. Attention is excluded: it ignores the causal mask."""
    config = tiny_config()
    model = checkpoint.random_model(config, dtype=torch.float32)
    model.vision_adapter.requires_grad_(True)
    batch = random_batch(3, config)
    with FlopCounterMode(display=False) as counter:
        model(batch).total.backward()
    counted = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in counted.items() if "mm" in str(op))
    count = count_parameters(config, PAPER[3])
    assert len(batch.read_rows) < batch.num_rows < batch.num_tokens
    mine = step_flops(config, count, batch.num_tokens, batch.num_rows, len(batch.read_rows), mean_length=0)
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
    assert hardware.measured_mfu("7b", "H200", tmp_path) == 0.5
    assert hardware.measured_mfu("13b", "H200", tmp_path) is None
    assert hardware.measured_mfu("7b", "H100", tmp_path) is None
    assert budget.main(["--model", "7b", "--stage", "2", "--measured", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rates = {line.split()[1]: line.split()[3] for line in lines if line.startswith("  8x")}
    assert rates == {"A100-40GB": "45%*", "A100-80GB": "45%*", "H100": "45%*", "H200": "50%"}
    assert sum("* assumed, not measured" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("name", "device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
        ("NVIDIA H100 PCIe", None, 756e12),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB", 312e12),
        ("NVIDIA H200", "H200", 989e12),
        ("NVIDIA H200 NVL", None, 835e12),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA L4", None, None),
    ],
)
def test_a_measurement_applies_only_to_its_own_device(name, device, peak, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_of(torch.device("cuda")) == peak
    rows = [
        {"model": "7b", "implementation": "pite", "mfu": 0.5},
        {"model": "7b", "implementation": "pite loop", "mfu": 0.4},
        {"model": "7b", "implementation": "pite fp8", "mfu": 0.6},
    ]
    (tmp_path / "step_x.json").write_text(json.dumps({"environment": {"device": name}, "rows": rows}))
    found = {key for key in hardware.DEVICES if hardware.measured_mfu("7b", key, tmp_path) == 0.4}
    assert found == ({device} if device else set())
    assert device is None or hardware.measured_mfu("7b", device, tmp_path, "pite fp8") == 0.6


def test_flops_of_a_clip_frame():
    assert frame_flops(VIT_L_14, 768) == pytest.approx(156e9, rel=0.01)


def test_more_devices_are_counted_by_wire():
    """Bytes over bandwidths: 7B's gradients take 31 ms between two hosts and 54 ms between eight, 5 ms inside one."""
    cost = stage_cost(TrainConfig(model=ModelConfig(size="7b")), 2)
    machine = next(m for m in cost.machines if (m.device, m.ranks) == ("A100-80GB", 8))
    slow = replace(machine, hours=1e-9)  # nothing hides the all-reduce
    reduce = [1000 * scaling.step_time(cost, slow, ranks).reduce for ranks in (8, 16, 64)]
    assert reduce == pytest.approx([4.8, 31, 54], rel=0.05)
    assert scaling.step_time(cost, slow, 64, gradient_bytes=2).reduce == pytest.approx(reduce[-1] / 2000, rel=0.01)
    assert scaling.step_time(cost, machine, 16).reduce == 0, "hidden behind backward"
    assert scaling.step_time(cost, machine, 8).gather == 0, "copied"
    sharded = replace(slow, layout=replace(machine.layout, shards=8))
    assert scaling.step_time(cost, sharded, 64).gather == pytest.approx(0.096, rel=0.02), "13 GB twice, over NVLink"
    assert scaling.step_time(cost, machine, 64).host == pytest.approx(32 * 1.9e-3), "one micro-batch"


def test_the_dry_run_names_the_devices_beyond_which_more_do_not_pay(capsys):
    assert budget.main(["--model", "7b"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "A100-80GB" in line and "do not pay" in line)
    hours = [float(number) for number in re.findall(r"\d+: ([\d.]+) h", line)]
    assert hours == sorted(hours, reverse=True) and len(hours) == 5
    assert 1 <= hours[0] / hours[1] <= 2 and hours[3] / hours[4] < 1.6, line


def test_devices_without_a_whole_host_have_a_reason_in_place_of_hours(capsys):
    assert budget.main(["--model", "7b", "--devices", "16"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "devices, more hosts: add 8 to --devices for their hours"


def test_a_batch_limits_the_devices_that_are_counted():
    def lines(*batches: int) -> list[str]:
        costs = [stage_cost(TrainConfig(optimization=OptimizationConfig(global_batch=batch)), 2) for batch in batches]
        return scaling.scaling_lines(costs)

    assert lines(7) == ["devices, more hosts: no hours for a batch of 7, less than a sample for each of 8"]
    costs = [stage_cost(TrainConfig(), 2)]
    assert scaling.scaling_lines(costs, gradient_bytes=2) != scaling.scaling_lines(costs), "fewer bytes, fewer hours"
    assert ", 16: " in lines(256, 16)[1] and ", 32: " not in lines(256, 16)[1]


@pytest.mark.parametrize(("ranks", "token_budget"), [(1, 4096), (1, 16384), (8, 16384)])
def test_videos_that_come_first_are_estimated_as_they_are_planned(ranks: int, token_budget: int):
    """For VideoInstruct100K's numbers of videos and questions, without the data."""
    config = TrainConfig(ModelConfig(family="pg-video-llava"), DataConfig(video_first="always"))
    cost = stage_cost(config, 3)
    corpus, video = cost.corpus, cost.model.num_features + 2
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(corpus.media), 1 + random.poisson(corpus.samples / corpus.media - 1, corpus.media))
    tokens = PROMPT_HEAD + video + random.integers(77, 197, len(groups))
    plan, batches = BatchPlan(len(groups), 32, 0, groups), []
    for step in range(30):
        chosen = plan.samples(step)
        prefixes = Prefixes(PROMPT_HEAD, PROMPT_HEAD + video, groups[chosen])
        batches.append(Lengths(tokens[chosen], int(corpus.targets) * 32, prefixes))
    counted = count_sharing(batches, ranks, token_budget)
    assumed = corpus.sharing(cost.recipe, ranks, token_budget)
    assert assumed.computed == pytest.approx(counted.computed, rel=0.03)
    assert assumed.copied == pytest.approx(counted.copied, rel=0.05)
    published = stage_cost(TrainConfig(ModelConfig(family="pg-video-llava")), 3)
    assert cost.rows < 0.4 * published.rows and cost.flops < 0.4 * published.flops


def test_the_second_familys_recipe_is_the_published_one():
    found = recipe("7b", 3, "pg-video-llava")
    numbers = (found.epochs, found.learning_rate, found.global_batch, found.warmup_ratio, found.lora_rank)
    assert numbers == (3, 2e-5, 32, 0.03, 0) and (found.weight_decay, found.label_smoothing) == (0, 0)
