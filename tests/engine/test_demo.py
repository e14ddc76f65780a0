"""The demo's plumbing: which commands it runs, what it does not run twice, and what it measures and draws."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import demo
from engine.held_out import measure_grounding, summarize
from pite.grounding import Events, Prediction, ious, read_ground_truth, write_predictions
from tests.held_out import FRAMES, make_held_out, save_model


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run; the first one leaves the annotations that the last one needs."""
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        assert not check
        commands.append(command[2:])
        if command[2] == "dataloaders.synthetic":
            path = Path(command[3]) / "evaluation" / "activitynet_captions.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            one = {"duration": 4.0, "timestamps": [[0, 1]], "sentences": ["A."]}
            path.write_text(json.dumps({"e0": one, "e1": {**one, "timestamps": [[0, 1]] * 2, "sentences": ["A."] * 2}}))
        return subprocess.CompletedProcess(command, int("fail" in command))

    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands


def test_every_step_is_run_once(tmp_path: Path, ran: list[list[str]]) -> None:
    config = demo.DemoConfig(tmp_path)
    seconds, first = demo.run_steps(config)
    assert first
    assert [command[0] for command in ran] == [
        "dataloaders.synthetic",
        "engine.tiny",
        "engine.encode",
        *["engine.train"] * 3,
        "pite.evaluate",
        "pite.chat",
    ]
    assert ran[-1][ran[-1].index("--video") + 1].endswith("e1.mp4"), "two objects are shown in the second"
    assert demo.run_steps(config) == (seconds, False)
    assert len(ran) == 8


def test_a_step_whose_command_changed_is_run_again(tmp_path: Path, ran: list[list[str]]) -> None:
    demo.run_steps(demo.DemoConfig(tmp_path))
    demo.run_steps(demo.DemoConfig(tmp_path, train="--epochs 1"))
    assert [command[0] for command in ran[8:]] == ["engine.train"] * 3


def test_a_step_that_fails_is_named_and_tried_again(
    tmp_path: Path, ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--output", str(tmp_path), "--tiny", "fail"]) == 1
    assert "engine.demo: step 'tiny models' ended with status 1: python -m engine.tiny" in capsys.readouterr().err
    assert demo.main(["--output", str(tmp_path), "--tiny", "fail"]) == 1
    assert [command[0] for command in ran] == ["dataloaders.synthetic", "engine.tiny", "engine.tiny"]


def test_grounding_is_told_apart_by_number_of_objects() -> None:
    truth = {"a": Events(((0.0, 0.5),), ("one",)), "b": Events(((0.0, 0.25), (0.5, 0.75)), ("one", "two"))}
    deaf = [
        Prediction("a", 0, "From 00 to 16."),
        Prediction("b", 0, "From 00 to 08."),
        Prediction("b", 1, "From 00 to 08."),
    ]
    every, by_objects = measure_grounding(deaf, truth, num_frames=32)
    assert every.miou == pytest.approx(2 / 3)
    assert (by_objects[1].miou, by_objects[1].query_blind) == (1.0, 1.0)
    assert (by_objects[2].miou, by_objects[2].query_blind) == (0.5, 0.5)
    assert every.query_blind == pytest.approx(2 / 3)
    assert every.best_fixed < every.query_blind
    listening = [*deaf[:2], Prediction("b", 1, "From 16 to 24.")]
    assert measure_grounding(listening, truth, num_frames=32)[1][2].miou == 1.0


def test_summary_has_the_promised_numbers_and_pictures(tmp_path: Path) -> None:
    make_held_out(tmp_path)
    for stage in (2, 3):
        save_model(tmp_path / "run" / f"stage{stage}" / "final", seed=stage)
    truth = read_ground_truth(tmp_path / "data" / "evaluation" / "activitynet_captions.json")
    answers = [
        Prediction(video, i, "From 00 to 07." if i else "It is not there.")
        for video, events in truth.items()
        for i in range(len(events.sentences))
    ]
    write_predictions(tmp_path / "grounding.jsonl", answers)
    summary = summarize(tmp_path)
    for name in (
        "trajectory_l1",
        "trajectory_l1_best_constant",
        "grounding_miou_best_fixed",
        "grounding_miou_query_blind",
    ):
        assert isinstance(summary[name], float) and 0 < summary[name] < 1.5
    assert summary["trajectory_l1"] != summary["trajectory_l1_after_stage3"]
    assert summary["grounding_miou"] == pytest.approx(np.mean(ious(answers, truth, FRAMES)))
    assert summary["grounding_miou"] > 0
    by_objects, counts = summary["grounding_miou_by_objects"], summary["questions_by_objects"]
    assert isinstance(by_objects, dict) and isinstance(counts, dict)
    weighted = sum(by_objects[n] * counts[n] for n in counts) / sum(counts.values())
    assert weighted == pytest.approx(summary["grounding_miou"])
    with Image.open(tmp_path / "overlay.png") as strip:
        assert np.asarray(strip).std() > 10
    assert (tmp_path / "overlay.mp4").stat().st_size > 1000
    told = demo.table({**summary, "seconds": {"world": 3.0, "chat": 4.0}})
    assert "total                7" in told
