"""The scaling table: its means, its plot, and the compute of stage 2 as the dry run counts it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import scaling
from bench.ablation import World
from bench.scaling import Point, plot, stage2_flops, table
from engine.config import TrainConfig
from engine.tiny.shipped import PARTS
from tests.engine.workspace import make_workspace

POINTS = [
    Point(128, 3400, 0, 4e12, 0.02, 0.7, 0.9),
    Point(128, 3400, 1, 4e12, 0.04, 0.5, 0.8),
    Point(128, 1000, 0, 1e12, 0.05, 0.4, 0.7),
    Point(256, 1000, 0, 3e12, 0.03, 0.6, 0.75),
]


def test_a_row_is_the_mean_over_the_seeds_of_a_width_and_a_number_of_videos():
    head, *rows = (line.split() for line in table(POINTS).splitlines())
    assert head == ["d", "videos", "seeds", "stage-2", "TFLOP", "l1", "slope", "miou"]
    assert rows == [
        ["128", "1000", "1", "1.00", "0.0500", "0.4000", "0.7000"],
        ["128", "3400", "2", "4.00", "0.0300", "0.6000", "0.8500"],
        ["256", "1000", "1", "3.00", "0.0300", "0.6000", "0.7500"],
    ]


def test_the_plot_is_a_picture(tmp_path: Path):
    plot(POINTS, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_compute_is_that_of_stage_2_with_the_same_flags(tmp_path: Path):
    workspace = make_workspace(tmp_path)
    (workspace / "features").rename(workspace / "store")
    (workspace / "llm").rename(workspace / "vicuna")
    world = World(workspace / "data", workspace / "store")
    flags = (["--global-batch", "8", "--epochs", epochs] for epochs in "12")
    once, twice = (stage2_flops(world, workspace / "vicuna", each) for each in flags)
    assert twice == pytest.approx(2 * once)
    # 24 samples of at least 30 tokens, and 17,408 weights in the linear layers: 4N per row, LoRA and the vocabulary head.
    assert 1 < once / (24 * 30 * 4 * 17_408) < 10


def test_every_pair_of_parts_and_videos_is_trained_with_every_seed(tmp_path: Path, monkeypatch, capsys):
    worlds, counted, runs = [], [], []

    def costs(config: TrainConfig) -> list[SimpleNamespace]:
        counted.append(config)
        return [SimpleNamespace(flops=1e12)]

    def train(world, output, vicuna, variant, seed, flags):
        runs.append((world.data.name, output.name))
        assert variant.name == "PiTe" and flags == ["--epochs", "1"]
        return {"l1": 0.5, "slope": 0.1 * seed, "miou": 0.2, "ce": 1.0}

    monkeypatch.setattr(
        World, "make", lambda world, clip, videos, *_, twins: worlds.append((world.store, clip, videos))
    )
    monkeypatch.setattr(scaling, "run_costs", costs)
    monkeypatch.setattr(scaling, "train_and_measure", train)
    flags = ["--output", str(tmp_path), "--videos", "10", "20", "--seeds", "2", "--train", "--epochs 1"]
    assert scaling.main(flags) == 0
    assert worlds == [(tmp_path / "store", PARTS / "clip", videos) for videos in (10, 20)]
    assert runs == [(f"data-{videos}", f"d128-{videos}") for videos in (10, 10, 20, 20)]
    assert [config.stages for config in counted] == [(2,), (2,)]
    assert {config.model.llm for config in counted} == {str(PARTS / "vicuna")}
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert [(p["width"], p["videos"], p["seed"], p["slope"]) for p in record["points"]] == [
        (128, 10, 0, 0.0), (128, 10, 1, 0.1), (128, 20, 0, 0.0), (128, 20, 1, 0.1)
    ]  # fmt: skip
    assert capsys.readouterr().out.startswith("    d  videos")
    assert (tmp_path / "scaling.png").exists()
