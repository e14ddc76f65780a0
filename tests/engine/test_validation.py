"""Validation on held-out samples: right numbers, on any number of ranks, and not one bit of training changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dataloaders.samples.batch import collate
from dataloaders.samples.dataset import StageDataset
from dataloaders.store.features import FeatureStore
from engine import job
from engine.build import load_tokenizer
from engine.loop import compute_losses
from engine.metrics import read_metrics
from engine.plots import plot_losses, read_curves
from engine.recipes import recipe
from engine.train import main
from pite.checkpoint import from_pretrained, load_heads
from tests.engine.distributed.ranks import train
from tests.engine.workspace import FRAMES, train_arguments

NAMES = ("validation_loss", "validation_ce", "validation_l1")


def dataset(workspace: Path, stage: int) -> StageDataset:
    frames, points = (1, 1) if stage == 1 else (FRAMES, 3)
    return StageDataset(
        workspace / "data",
        stage,
        load_tokenizer(workspace / "llm"),
        num_frames=frames,
        num_points=points,
        max_length=2048,
        available=None,
    )


def metrics(output: Path, stage: int = 1) -> list[dict[str, float]]:
    return read_metrics(output / f"stage{stage}" / "metrics.jsonl")


def test_training_is_bitwise_the_same_with_and_without(workspace: Path, tmp_path: Path):
    flags = {"held_out": 0.3, "global_batch": 4}
    for name, more in (("without", {}), ("with", {"validate_every": 1})):
        assert main(train_arguments(workspace, tmp_path / name, "1", **flags, **more)) == 0
    without, validated = (metrics(tmp_path / name) for name in ("without", "with"))
    numbers = ("loss", "ce", "l1", "gradient_norm", "learning_rate", "tokens")
    assert [[line[n] for n in numbers] for line in without] == [[line[n] for n in numbers] for line in validated]
    assert not any(name in line for line in without for name in NAMES)
    assert all(name in line for line in validated for name in NAMES)
    one, two = (tmp_path / name / "stage1/final/adapter_model.safetensors" for name in ("without", "with"))
    assert one.read_bytes() == two.read_bytes()


def test_the_numbers_are_those_of_the_held_out_samples(workspace: Path, tmp_path: Path):
    """One batch of all held-out samples through the exported model gives the last step's validation."""
    flags = {"held_out": 0.4, "validate_every": 100, "global_batch": 2}
    assert main(train_arguments(workspace, tmp_path, "1", **flags)) == 0
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if NAMES[0] in line] == [len(lines)], "at the last step too"
    trained, held_out = dataset(workspace, 1).split(0.4)
    assert len(held_out) > 2 and len(trained) + len(held_out) == 24
    assert not set(trained.media) & set(held_out.media)
    store = FeatureStore(workspace / "features" / "images")
    samples = [held_out[i] for i in range(len(held_out))]
    batch = collate(samples, [store.read(sample.media) for sample in samples])
    model = from_pretrained(tmp_path / "stage1" / "final")
    load_heads(model, tmp_path / "stage1" / "final")
    with torch.no_grad():
        losses = compute_losses(model, batch, recipe("tiny", 1))
    expected = [float(losses.total), float(losses.ce), float(losses.l1)]
    assert [lines[-1][name] for name in NAMES] == pytest.approx(expected, rel=1e-5)


def test_ranks_share_the_validation(workspace: Path, tmp_path: Path):
    flags = {"held_out": 0.2, "validate_every": 2, "max_steps": 4, "global_batch": 3}
    assert main(train_arguments(workspace, tmp_path / "one", "1", **flags)) == 0
    for name, more in (("two", {}), ("sharded", {"parallel": "fsdp"})):
        arguments = train_arguments(workspace, tmp_path / name, "1", **flags, **more)
        ranks = train(2, tmp_path / "logs" / name, arguments)
        assert ranks.wait() == [0, 0], ranks.stderr(0)
        for line, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / name), strict=True):
            for key in NAMES:
                assert (key in line) == (line["step"] % 2 == 0) == (key in other)
                if key in line:
                    assert other[key] == pytest.approx(line[key], rel=1e-5)


def test_a_file_names_the_held_out_samples(workspace: Path, tmp_path: Path, capsys):
    every = dataset(workspace, 2)
    file = tmp_path / "held_out.txt"
    file.write_text(f"{every.ids[3]}\n{every.media[5]}\n")
    trained, held_out = every.split(file)
    assert held_out.ids == [every.ids[3], every.ids[5]]
    assert trained.ids == [name for i, name in enumerate(every.ids) if i not in (3, 5)]
    np.testing.assert_array_equal(held_out.tokens, every.tokens[[3, 5]])
    assert trained.fingerprint() != every.fingerprint()
    file.write_text("no such id\n")
    output = tmp_path / "run"
    assert main(train_arguments(workspace, output, "1", held_out=file, validate_every=1)) == 1
    assert "none of its 1 lines is the id or media key of a sample" in capsys.readouterr().err
    assert main(train_arguments(workspace, output, "1", held_out=tmp_path / "nowhere", validate_every=1)) == 1
    assert "neither a share nor a file" in capsys.readouterr().err


def test_other_held_out_samples_are_another_run(workspace: Path, tmp_path: Path, capsys):
    flags = {"max_steps": 2, "global_batch": 4}
    assert main(train_arguments(workspace, tmp_path, "1", **flags, held_out=0.3)) == 0
    assert main(train_arguments(workspace, tmp_path, "1", **flags, held_out=0.5)) == 1
    assert "data was " in capsys.readouterr().err
    # How often to validate does not change what is trained.
    assert (
        main(train_arguments(workspace, tmp_path, "1", max_steps=4, global_batch=4, held_out=0.3, validate_every=1))
        == 0
    )


def test_validation_is_in_the_plots(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job, "plot_losses", plot_losses)
    flags = {"held_out": 0.3, "validate_every": 2, "global_batch": 4}
    assert main(train_arguments(workspace, tmp_path, "1", **flags)) == 0
    curves = read_curves(tmp_path / "stage1" / "metrics.jsonl")
    assert np.isfinite(curves["validation_loss"][1::2]).all() and np.isnan(curves["validation_loss"][0])
    drawn = (tmp_path / "stage1" / "losses.png").read_bytes()
    lines = (tmp_path / "stage1" / "metrics.jsonl").read_text().replace("validation_", "other_")
    (tmp_path / "metrics.jsonl").write_text(lines)
    plot_losses({"stage1": tmp_path / "metrics.jsonl"}, tmp_path / "without.png")
    assert (tmp_path / "without.png").read_bytes() != drawn


def test_parameters_of_a_checkpoint_do_not_depend_on_validation(workspace: Path, tmp_path: Path):
    """Moments of AdamW included, also when the run is resumed in between."""
    flags = {"held_out": 0.3, "global_batch": 4, "checkpoint_every": 2}
    assert main(train_arguments(workspace, tmp_path / "plain", "1", **flags)) == 0
    validated = {**flags, "validate_every": 1}
    assert main(train_arguments(workspace, tmp_path / "resumed", "1", **validated, max_steps=4)) == 0
    assert main(train_arguments(workspace, tmp_path / "resumed", "1", **validated)) == 0
    newest = [sorted((tmp_path / n / "stage1/checkpoints").glob("step-*"))[-1] for n in ("plain", "resumed")]
    assert newest[0].name == newest[1].name
    for file in newest[0].glob("*.safetensors"):
        one, two = load_file(file), load_file(newest[1] / file.name)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    shutil.rmtree(tmp_path / "plain")


def test_compiled_layers_validate(workspace: Path, tmp_path: Path, monkeypatch):
    """Shared prefixes and none, one sample alone, with and without gradients: more programs than Dynamo's default limit."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, fullgraph: compile_(function, fullgraph=fullgraph, backend="eager")
    )
    flags = {
        "llm": "random",
        "held_out": 0.3,
        "validate_every": 1,
        "max_steps": 6,
        "compile": True,
        "token_budget": 130,
    }
    assert main(train_arguments(workspace, tmp_path, "3", **flags)) == 0
    assert all(name in line for line in metrics(tmp_path, 3) for name in NAMES)
