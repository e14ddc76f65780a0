"""The ablation's table and curves, and that the flags of every variant are valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.ablation import VARIANTS, World, differences, plot_curves, table, train_and_measure, training_hours, twins
from dataloaders.cli import parse
from dataloaders.files import sha256
from engine.train import TrainConfig
from pite.evaluate.grounding import Events


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_flags_of_a_variant_are_flags_of_engine_train(variant):
    config = parse(TrainConfig, ["--model", "tiny", "--llm", "x", *variant.flags])
    assert (config != parse(TrainConfig, ["--model", "tiny", "--llm", "x"])) == bool(variant.flags)
    # A variant that changes stage 1 cannot reuse the stage 1 of another.
    assert variant.after_stage1 == (variant.name in ("PiTe", "no head initialisation", "no trajectory stage"))


def test_curves_and_table_show_every_seed(tmp_path: Path):
    for name in ("PiTe", "fp8"):
        for seed in range(2):
            folder = tmp_path / name / str(seed) / "stage2"
            folder.mkdir(parents=True)
            lines = [{"step": i + 1, "loss": 1.0, "ce": 2.0 / (i + 1 + seed), "l1": 0.1} for i in range(40)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = [v for v in VARIANTS if v.name in ("PiTe", "fp8", "no trajectory stage")]
    plot_curves(tmp_path, chosen, 2)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no such file"):
        plot_curves(tmp_path, chosen, 3)
    text = table(
        {"PiTe": [{"ce": 1.0, "miou": 0.5}, {"ce": 2.0, "miou": 0.5}], "no trajectory stage": [{"miou": 0.25}]}
    )
    _, first, second = (line.split() for line in text.splitlines())
    assert first == ["PiTe", "2", "1.5000", "+-", "0.7071", "-", "-", "-", "0.5000", "+-", "0.0000", "-", "-", "-"]
    assert second == ["no", "trajectory", "stage", "1", "-", "-", "-", "-", "0.2500", "-", "-", "-"]


def test_differences_are_of_equal_seeds_with_the_interval_of_students_t():
    """Differences .1, .2, .3: mean .2, standard deviation .1, t(2) 4.303, so half the interval is .2484."""
    base = [{"miou": value} for value in (0.5, 0.6, 0.9)]
    text = differences({"PiTe": base, "P = 1": [{"miou": value} for value in (0.6, 0.8, 1.2)], "fp8": [{"miou": 0.1}]})
    head, first, second = text.splitlines()
    assert first.split()[4:] == ["-", "-", "+0.2000", "(-0.0484,", "+0.4484)", "-"], first
    assert second.split()[2:] == ["-"] * 4, "one seed has no interval"
    assert head.split()[:3] == ["minus", "PiTe", "pairs"]


def test_scores_of_other_parts_are_refused(tmp_path: Path):
    folder = tmp_path / "PiTe" / "0"
    folder.mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.safetensors").write_bytes(bytes(number))
    settings = {"vicuna": sha256(tmp_path / "1" / "model.safetensors"), "train": ["--epochs", "1"]}
    (folder / "scores.json").write_text(json.dumps({"settings": settings, "scores": {"miou": 0.5}}))
    world = World(tmp_path / "data", tmp_path / "store")
    assert train_and_measure(world, tmp_path, tmp_path / "1", VARIANTS[0], 0, ["--epochs", "1"]) == {"miou": 0.5}
    for vicuna, flags in (("2", ["--epochs", "1"]), ("1", [])):
        with pytest.raises(SystemExit, match="other --parts or --train: give another --output"):
            train_and_measure(world, tmp_path, tmp_path / vicuna, VARIANTS[0], 0, flags)


def test_hours_are_those_of_every_step_once(tmp_path: Path):
    """A step that a resumed run logs again counts once."""
    for stage, seconds in ((1, [1800.0]), (2, [3600.0, 900.0])):
        (tmp_path / f"stage{stage}").mkdir()
        lines = [{"step": step, "seconds": value} for step, value in enumerate([*seconds, seconds[-1]], 1)]
        lines[-1]["step"] -= 1
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"stage{stage}" / "metrics.jsonl").write_text(text)
    assert training_hours(tmp_path) == pytest.approx(1.75)


def test_twins_differ_in_their_motion_alone():
    def events(*sentences: str) -> Events:
        return Events(((0.0, 0.5),) * len(sentences), sentences)

    equal = events("A red circle moves left.", "A red circle moves up.")
    truth = {
        "a": equal,
        "b": events("A red circle moves left.", "A red square moves left."),
        "c": events("A red circle moves left."),
    }
    assert twins(truth) == {"a"}
