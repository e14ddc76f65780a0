"""Flags of engine.train: random weights, profiles, Weights & Biases, the paper's ablations."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import job, prepare
from engine.build import random_shape
from engine.config import RunConfig
from engine.distributed.world import World
from engine.metrics import read_metrics
from engine.preflight import claimed
from engine.train import main
from pite.checkpoint import read_lineage
from tests.engine.workspace import train_arguments


def test_random_weights_need_no_earlier_stage_and_export_no_model(workspace: Path, tmp_path: Path, capsys):
    assert main(train_arguments(workspace, tmp_path, "3", llm="random", max_steps=2)) == 0
    assert main(train_arguments(workspace, tmp_path, "3", llm="random", epochs=2)) == 0
    assert "random weights are not exported" in capsys.readouterr().err
    assert not (tmp_path / "stage3" / "final").exists()
    assert len(read_metrics(tmp_path / "stage3" / "metrics.jsonl")) == 16
    assert main(train_arguments(workspace, tmp_path, "3", llm="random", seed=1)) == 1
    assert "cannot continue" in capsys.readouterr().err


def test_chosen_steps_are_profiled(workspace: Path, tmp_path: Path):
    flags = {"llm": "random", "max_steps": 4}
    assert main([*train_arguments(workspace, tmp_path, "1", **flags), "--profile", "2", "3"]) == 0
    (trace,) = (tmp_path / "stage1" / "profile").iterdir()
    assert trace.name == "rank0.trace.json.gz"
    with gzip.open(trace) as file:
        events = [str(event.get("name")) for event in json.load(file)["traceEvents"]]
    # In each step one launch for the decoder, one for the adapter and one for the head: each has its own learning rate.
    assert sum("_fused_adamw_" in name and name.startswith("aten::") for name in events) == 2 * 3
    assert any("LoRALinear" in name for name in events)


def test_a_profile_of_steps_after_the_last_is_refused(workspace: Path, tmp_path: Path, capsys):
    assert main([*train_arguments(workspace, tmp_path, "1", llm="random"), "--profile", "900", "902"]) == 1
    assert "--profile starts at step 900, and stage 1 has 6" in capsys.readouterr().err


def test_the_attention_backend_is_printed(workspace: Path, tmp_path: Path, capsys, monkeypatch):
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(prepare, "choose_backend", lambda *kind: calls.append(kind) or "varlen_attn")
    assert main(train_arguments(workspace, tmp_path, "1", llm="random", max_steps=1)) == 0
    (layout,) = (line for line in capsys.readouterr().err.splitlines() if "rows a micro-batch" in line)
    assert layout.endswith(", attention by varlen_attn")
    llama = random_shape("tiny", 3, 1, 1).llm
    heads = llama.num_attention_heads
    width = llama.hidden_size // heads
    assert calls == [(torch.device("cpu"), torch.float32, heads, llama.num_key_value_heads, width)]


def test_compile_is_passed_on_to_every_layer(workspace: Path, tmp_path: Path, monkeypatch):
    """The tests of the model check that the result is the same."""
    traced: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: traced.append(function.__name__) or function)
    assert main(train_arguments(workspace, tmp_path, "1", llm="random", max_steps=1, compile=True)) == 0
    assert traced == ["_before", "_after"] * 4


def test_deterministic_algorithms_are_on_before_the_ranks_join(workspace: Path, tmp_path: Path, monkeypatch):
    """The tests of the kernels run with this mode."""
    calls: list[str] = []
    monkeypatch.setattr(job, "use_deterministic_algorithms", lambda: calls.append("deterministic"))
    monkeypatch.setattr(job, "check_same_command", lambda *_: calls.append("joined"))
    flags = {"llm": "random", "max_steps": 1}
    assert main(train_arguments(workspace, tmp_path / "a", "1", **flags, deterministic=True)) == 0
    assert main(train_arguments(workspace, tmp_path / "b", "1", **flags)) == 0
    assert calls == ["deterministic", "joined", "joined"]


def test_weights_and_biases_gets_every_step(workspace: Path, tmp_path: Path, monkeypatch):
    logged: list[tuple[int, dict[str, float]]] = []
    ended: list[int] = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda exit_code: ended.append(exit_code)
    )
    started: list[dict[str, object]] = []

    def init(**options: object) -> SimpleNamespace:
        started.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    output = tmp_path / "run"
    assert main(train_arguments(workspace, output, "1", llm="random", max_steps=2, wandb="pite")) == 0
    assert [step for step, _ in logged] == [1, 2]
    assert logged[0][1]["loss"] == read_metrics(output / "stage1" / "metrics.jsonl")[0]["loss"]
    assert ended == [0]
    assert (started[0]["project"], started[0]["id"], started[0]["resume"]) == ("pite", "run-stage1", "allow")


def test_a_missing_wandb_package_is_named(workspace: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(train_arguments(workspace, tmp_path, "1", wandb="pite")) == 1
    assert "pip install wandb" in capsys.readouterr().err


def test_the_papers_ablations_are_flags(workspace: Path, tmp_path: Path, capsys):
    """One point, no head initialisation, another lambda and smoothing; then no trajectory stage at all."""
    flags = {"num_points": 1, "head_init": False, "trajectory_weight": 0.5, "label_smoothing": 0.0}
    assert main(train_arguments(workspace, tmp_path, "1", **flags)) == 0
    assert main(train_arguments(workspace, tmp_path, "2", max_steps=2, **flags)) == 0
    assert main([*train_arguments(workspace, tmp_path, "3", **flags), "--no-trajectory-stage"]) == 0
    lineage = read_lineage(tmp_path / "stage3" / "final")
    assert [Path(entry["path"]).parent.name for entry in lineage["merged"]] == ["stage1"]
    assert main(train_arguments(workspace, tmp_path / "six", "2", llm="random", num_points=6)) == 1
    assert "5 tracks where 6 are needed" in capsys.readouterr().err


def test_without_the_trajectory_stage_all_is_two_stages():
    assert RunConfig(trajectory_stage=False).stages == (1, 3)
    with pytest.raises(ValueError, match="--stage 2 is the trajectory stage"):
        RunConfig(stage="2", trajectory_stage=False)
    with pytest.raises(ValueError, match="--profile takes a first and a last step"):
        RunConfig(profile=(3, 2))


@pytest.mark.parametrize(
    "flag, value",
    [
        ("max_steps", 0),
        ("lora_rank", 0),
        ("epochs", 0),
        ("global_batch", 0),
        ("learning_rate", -1),
        ("learning_rate", "nan"),
        ("label_smoothing", 1),
        ("recompute", -1),
    ],
)
def test_an_invalid_number_is_refused_with_its_flag(workspace: Path, tmp_path: Path, capsys, flag, value):
    with pytest.raises(SystemExit) as ended:
        main(train_arguments(workspace, tmp_path, "1", **{flag: value}))
    assert ended.value.code == 2
    assert f"--{flag.replace('_', '-')} must be" in capsys.readouterr().err


def test_max_steps_below_the_steps_done_trains_nothing(workspace: Path, tmp_path: Path, capsys):
    assert main(train_arguments(workspace, tmp_path, "1", max_steps=4)) == 0
    assert main(train_arguments(workspace, tmp_path, "1", max_steps=2)) == 0
    assert "--max-steps reached: saved step 4 of 6" in capsys.readouterr().err


def test_missing_data_of_a_later_stage_are_reported_before_the_first(workspace: Path, tmp_path: Path, capsys):
    data = tmp_path / "data"
    shutil.copytree(workspace / "data", data, ignore=shutil.ignore_patterns("stage3"))
    arguments = {"data": data, "llm": "not/there"}
    assert main(train_arguments(workspace, tmp_path / "run", **arguments)) == 1
    assert "stage3 holds none of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    missing = {"data": tmp_path / "nowhere"}
    assert main([*train_arguments(workspace, tmp_path / "run", **missing), "--dry-run"]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(workspace: Path, tmp_path: Path, capsys):
    with claimed(tmp_path, World(0, 1, torch.device("cpu"))):
        assert main(train_arguments(workspace, tmp_path, "1")) == 1
    assert "is being written by another run" in capsys.readouterr().err
    assert main(train_arguments(workspace, tmp_path, "1", max_steps=1)) == 0
