"""The demo: which commands it runs, which it does not repeat, and what it measures and draws."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.demo import __main__ as demo
from engine.demo.captions import Captions, score_captions, score_dense
from engine.demo.held_out import PROTOCOL, measure_grounding, summarize
from engine.tiny.shipped import PARTS
from pite.evaluate.grounding import Events, ious, read_truth
from pite.evaluate.predictions import Prediction, PredictionWriter
from tests.commands import status_of
from tests.held_out import FRAMES, make_held_out, save_model
from tests.pite.evaluate.captioning.test_java import needs_java


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[demo.Step]:
    """The steps that ran, faked: each writes its product, unless its flags contain `fail` or `stop-early`."""
    ran: list[demo.Step] = []
    named: list[demo.Step] = []
    one = {"duration": 4.0, "timestamps": [[0, 1]], "sentences": ["A."]}
    two = {"duration": 4.0, "timestamps": [[0, 1], [2, 3]], "sentences": ["A.", "B."]}
    real_steps = demo.steps

    def steps(config: demo.DemoConfig) -> Iterator[demo.Step]:
        for step in real_steps(config):
            named.append(step)
            yield step

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        step = named[-1]
        assert command[1:] == ["-m", step.module, *step.arguments] and not check
        ran.append(step)
        if "stop-early" not in command:
            step.product.parent.mkdir(parents=True, exist_ok=True)
            step.product.write_text(json.dumps({"e0": one, "e1": two}))
        return subprocess.CompletedProcess(command, int("fail" in command))

    monkeypatch.setattr(demo, "steps", steps)
    monkeypatch.setattr(demo.subprocess, "run", run)
    return ran


def test_every_step_is_run_once(tmp_path: Path, ran: list[demo.Step]) -> None:
    config = demo.DemoConfig(tmp_path)
    seconds, first = demo.run_steps(config)
    assert first
    assert [step.module for step in ran] == [
        "dataloaders.synthetic",
        "engine.encode",
        *["engine.train"] * 3,
        "pite.evaluate",
        *["pite.chat"] * 2,
    ]
    assert "e1.mp4" in ran[-1].command, "the second video shows two objects"
    assert "During which frames can we see a?" in ran[-2].arguments
    assert demo.run_steps(config) == (seconds, False)
    assert len(ran) == 8
    assert all(f"{tmp_path}/models/vicuna" in step.arguments for step in ran if step.module == "engine.train")
    for part in ("clip", "vicuna"):
        copy = tmp_path / "models" / part / "model.safetensors"
        assert copy.read_bytes() == (PARTS / part / "model.safetensors").read_bytes()


def test_other_tiny_models_are_refused(
    tmp_path: Path, ran: list[demo.Step], capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run_steps(demo.DemoConfig(tmp_path))
    (tmp_path / "models" / "clip" / "model.safetensors").write_bytes(b"others")
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert (
        f"models/clip is not the package's tiny model: remove {tmp_path}, or give another --output"
        in capsys.readouterr().err
    )


def test_pretraining_makes_the_models_that_the_later_steps_start_from(tmp_path: Path, ran: list[demo.Step]) -> None:
    demo.run_steps(demo.DemoConfig(tmp_path, pretrain=True, num_frames=16, tiny="--clip-steps 3"))
    assert ran[1].module == "engine.tiny" and ran[1].arguments[-2:] == ("--clip-steps", "3")
    assert f"{tmp_path}/models/vicuna" in ran[3].arguments


def test_pretraining_does_not_mix_with_the_packages_models(
    tmp_path: Path, ran: list[demo.Step], capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run_steps(demo.DemoConfig(tmp_path))
    assert demo.main(["--output", str(tmp_path), "--pretrain"]) == 1
    assert "was made from the package's tiny models: give another --output with --pretrain" in capsys.readouterr().err
    assert len(ran) == 8, "no step ran"


def test_settings_that_need_pretraining_are_refused_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in ((["--tiny", "--seed 1"], "add --pretrain"), (["--num-frames", "16"], "reads videos of 32")):
        assert status_of(demo.main, flags) == 2
        assert message in capsys.readouterr().err


def test_a_step_is_run_again_when_its_command_changed_or_its_product_is_gone(
    tmp_path: Path, ran: list[demo.Step]
) -> None:
    demo.run_steps(demo.DemoConfig(tmp_path))
    demo.run_steps(demo.DemoConfig(tmp_path, train="--epochs 1"))
    assert [step.title for step in ran[8:]] == ["stage 1", "stage 2", "stage 3"]
    (tmp_path / "grounding.jsonl").unlink()
    demo.run_steps(demo.DemoConfig(tmp_path, train="--epochs 1"))
    assert [step.title for step in ran[11:]] == ["grounding"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("fail", "engine.demo: step 'pre-training' ended with status 1: python -m engine.tiny"),
        ("stop-early", "engine.demo: step 'pre-training' was stopped before it was done; the same command continues"),
    ],
)
def test_a_failed_step_is_named_and_run_again(
    tmp_path: Path, ran: list[demo.Step], flag: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert demo.main(["--output", str(tmp_path), "--pretrain", "--tiny", flag]) == 1
        assert message in capsys.readouterr().err
    assert [step.title for step in ran] == ["world", "pre-training", "pre-training"]


def prediction(video: str, sentence: int, answer: str) -> Prediction:
    return Prediction(video, "grounding", 0, answer, {"sentence_id": sentence})


def test_grounding_is_scored_by_number_of_objects() -> None:
    truth = {"a": Events(((0.0, 0.5),), ("one",)), "b": Events(((0.0, 0.25), (0.5, 0.75)), ("one", "two"))}
    question_blind = [
        prediction("a", 0, "From 00 to 16."),
        prediction("b", 0, "From 00 to 08."),
        prediction("b", 1, "From 00 to 08."),
    ]
    every, by_objects = measure_grounding(question_blind, truth, num_frames=32)
    assert every.miou == pytest.approx(2 / 3)
    assert (by_objects[1].miou, by_objects[1].question_blind) == (1.0, 1.0)
    assert (by_objects[2].miou, by_objects[2].question_blind) == (0.5, 0.5)
    assert every.question_blind == pytest.approx(2 / 3)
    assert every.best_fixed < every.question_blind
    correct = [*question_blind[:2], prediction("b", 1, "From 16 to 24.")]
    assert measure_grounding(correct, truth, num_frames=32)[1][2].miou == 1.0


def test_summary_has_all_numbers_and_pictures(tmp_path: Path) -> None:
    make_held_out(tmp_path)
    for stage in (2, 3):
        save_model(tmp_path / "run" / f"stage{stage}" / "final", seed=stage)
    truth = read_truth(tmp_path / "data" / "evaluation" / "activitynet_captions.json")
    answers = [
        prediction(video, i, "From 00 to 07." if i else "It is not there.")
        for video, events in truth.items()
        for i in range(len(events.sentences))
    ]
    with PredictionWriter(tmp_path / "grounding.jsonl") as log:
        log.append(answers)
    summary = summarize(tmp_path)
    for name in (
        "trajectory_l1",
        "trajectory_l1_best_constant",
        "trajectory_l1_static_oracle",
        "grounding_miou_best_fixed",
        "grounding_miou_query_blind",
    ):
        assert isinstance(summary[name], float) and 0 < summary[name] < 1.5
    assert summary["trajectory_l1"] != summary["trajectory_l1_after_stage3"]
    assert summary["grounding_miou"] == pytest.approx(np.mean(ious(answers, truth, FRAMES, PROTOCOL)))
    assert summary["grounding_miou"] > 0
    by_objects, counts = summary["grounding_miou_by_objects"], summary["questions_by_objects"]
    assert isinstance(by_objects, dict) and isinstance(counts, dict)
    weighted = sum(by_objects[n] * counts[n] for n in counts) / sum(counts.values())
    assert weighted == pytest.approx(summary["grounding_miou"])
    with Image.open(tmp_path / "overlay.png") as strip:
        assert np.asarray(strip).std() > 10
    assert (tmp_path / "overlay.mp4").stat().st_size > 1000
    table = demo.table({**summary, "seconds": {"world": 3.0, "chat": 4.0}})
    assert "total                7" in table
    assert f"motion slope          {summary['motion_slope']:.3f}    directions" in table
    assert summary["caption_events"] == len(answers)


def test_captions_are_scored_by_event() -> None:
    events = Events(((0.0, 0.5), (0.5, 1.0)), ("A red circle moves left.", "A blue square moves up."))
    right = "From 00 to 16, a red circle moves left. From 16 to 31, a blue square moves up."
    assert score_captions({"v": right}, {"v": events}, 32) == Captions(1, 1, 1, 1, 1, 2)
    other = "A blue triangle moves up, from 15 to 30. From 00 to 14, a red circle moves right."
    near = "From 15 to 30, a blue triangle moves up. From 00 to 14, a red circle moves right."
    assert score_captions({"v": near}, {"v": events}, 32) == Captions(1, 0.5, 0.5, 0.5, 0, 2)
    assert score_captions({"v": other}, {"v": events}, 32) == Captions(0.5, 0.5, 0, 0, 0, 2)
    assert score_captions({"v": "There is nothing."}, {"v": events}, 32) == Captions(0, 0, 0, 0, 0, 2)
    with pytest.raises(ValueError, match=r"'A dog runs\.' is no sentence of the synthetic world"):
        score_captions({"v": right}, {"v": Events(((0.0, 1.0),), ("A dog runs.",))}, 32)


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    events = {"duration": 8.0, "timestamps": [[0, 4], [4, 8]]}
    sentences = ["A red circle moves left.", "A blue square moves up."]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({video: {**events, "sentences": sentences} for video in "vw"}))
    return path


@needs_java
def test_descriptions_have_captioning_scores(annotations: Path) -> None:
    right = "From 00 to 15, a red circle moves left. From 16 to 31, a blue square moves up."
    wrong = "From 00 to 15, a blue triangle moves up. From 16 to 31, a red circle moves right."
    scores = score_dense({"v": right, "w": wrong}, annotations, 32)
    assert scores.keys() == {"soda_c", "METEOR", "CIDEr"}
    assert 50 < scores["soda_c"] < 100, "one of two videos is right"


def test_without_java_there_are_no_captioning_scores(
    annotations: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert score_dense({"v": ""}, annotations, 32) == {}
    assert "no captioning scores: dense captioning is scored with" in caplog.text
