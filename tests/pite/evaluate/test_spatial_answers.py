"""A model answers the questions of HC-STVG, and a detector by colour grounds the answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.annotation.boxes import box_ious
from dataloaders.annotation.steps import Phrase
from pite.chat.session import Model
from pite.evaluate.__main__ import main
from pite.evaluate.spatial import answering
from pite.evaluate.spatial.truth import Tube
from pite.ground.grounding import Footage, Grounder
from tests.commands import status_of
from tests.held_out import CHANNELS, save_clip, save_model
from tests.pite.ground.squares import Colours, place, write_squares

FIRST, COUNT = 4, 9
"""Annotated frames of each video."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/videos with two good videos and a broken one, and the model."""
    root = tmp_path_factory.mktemp("made")
    (root / "videos" / "0").mkdir(parents=True)
    write_squares(root / "videos/0/1_a.mp4", "red", "blue")
    write_squares(root / "videos/2_b.mp4", "green")
    (root / "videos/3_c.mp4").write_bytes(b"no video")
    save_model(root / "model", seed=0)
    save_clip(root / "clip", CHANNELS)
    return root


@pytest.fixture(autouse=True, scope="module")
def grounder() -> Iterator[None]:
    """Random weights name nothing, so the phrases do not depend on the answer, which is short."""
    phrases = [Phrase("The image", 0), Phrase("a red square", 20)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "MAX_NEW_TOKENS", 4)
        patch.setattr(answering, "open_grounder", lambda flags: Grounder(lambda text: phrases, Colours()))
        yield


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that nothing disturbs, and m.json next to it."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(made, folder / "p.jsonl", "--metrics", f"{folder}/m.json") == 0
    return folder / "p.jsonl"


def run(made: Path, predictions: Path, *more: str, names: tuple[str, ...] = ("1_a", "2_b", "3_c")) -> int:
    """Answer a caption of each video, whose true box is the red square's."""
    boxes = [place("red", frame) for frame in range(FIRST, FIRST + COUNT)]
    listed = [[*box[:2].tolist(), *(box[2:] - box[:2]).tolist()] for box in boxes]
    record = {"bbox": listed, "st_frame": FIRST + 1, "img_num": 200, "img_size": [96, 128], "English": "Who moves?"}
    truth = predictions.parent / "val_v2.json"
    truth.write_text(json.dumps({f"{name}.mp4": record for name in names}))
    flags = {"--model": made / "model", "--clip": made / "clip", "--videos": made / "videos"}
    where = [text for name, path in flags.items() for text in (name, f"{path}")]
    files = ["--ground-truth", f"{truth}", "--predictions", f"{predictions}", "--device", "cpu"]
    return status_of(main, ["spatial", "--benchmark", "hc_stvg", *where, *files, *more])


def lines(path: Path) -> dict[str, dict[str, Any]]:
    return {record["video_id"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_a_models_answers_are_grounded_and_scored(made: Path, whole: Path) -> None:
    found = lines(whole)
    video = made / "videos/0/1_a.mp4"
    footage = Footage.of(video)
    model = Model(made / "model", f"{made}/clip", "cpu", 1)
    span = (FIRST, FIRST + COUNT)
    assert footage.between(footage.seconds(span)) == span
    part, entire = (model.videos.get(video, clip).features for clip in (footage.seconds(span), None))
    assert (part != entire).any(), "the model sees the interval"
    (answer,) = model.generator.answer(["Who moves?"], [part], max_new_tokens=answering.MAX_NEW_TOKENS)
    assert (found["1_a"]["query_id"], found["1_a"]["answer"]) == (0, answer.text)
    info = found["1_a"]["info"]
    assert (info["phrase"], info["size"]) == ("a red square", [128, 96])
    boxes = {int(frame): box for frame, (box,) in info["boxes"].items()}
    assert list(boxes) == list(range(*span))
    score = sum(float(box_ious(place("red", f)[None], np.array(boxes[f]))[0]) for f in boxes) / COUNT
    assert score > 0.8
    assert found["2_b"]["info"]["boxes"] == {}, "the red square is not in this video"
    assert found["3_c"]["info"]["boxes"] == {} and found["3_c"]["info"]["error"].startswith("3_c.mp4: ")
    numbers = json.loads(whole.with_name("m.json").read_text())["spatial_grounding"]
    assert numbers["m_sIoU"] == pytest.approx(100 * score / 3)
    assert (numbers["questions without a box"], numbers["questions failed"]) == (2, 1)


def test_the_order_of_the_videos_changes_no_answer(made: Path, whole: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "q.jsonl", names=("3_c", "2_b", "1_a")) == 0
    one, two = lines(whole), lines(tmp_path / "q.jsonl")
    assert list(one) == list(two)[::-1]
    assert all((one[name]["answer"], one[name]["info"]) == (two[name]["answer"], two[name]["info"]) for name in one)


def test_a_killed_run_is_continued_to_the_same_file(
    made: Path, whole: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    answer, calls = answering.Answerer.__call__, []

    def killed(self: answering.Answerer, *rest: Any) -> Any:
        calls.append(rest)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(answering.Answerer, "__call__", killed)
        assert run(made, tmp_path / "p.jsonl") != 0
        (tmp_path / "p.jsonl").write_bytes((tmp_path / "p.jsonl").read_bytes() + whole.read_bytes()[:20])
        assert run(made, tmp_path / "p.jsonl") == 0
    assert len(calls) == 4, "the first question is not answered again"
    assert (tmp_path / "p.jsonl").read_bytes() == whole.read_bytes()
    printed = capsys.readouterr().out
    assert "over 3 questions; 2 without a box" in printed and "1 of them failed, such as 3_c: 3_c.mp4" in printed


def test_a_fault_of_the_machine_is_no_answer(made: Path, whole: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def missing(self: Colours, *rest: Any) -> Any:
        raise ValueError("install OpenCV's people detector")

    with monkeypatch.context() as patch:
        patch.setattr(Colours, "__call__", missing)
        assert run(made, tmp_path / "p.jsonl") == 1
    assert "install OpenCV's people detector" in capsys.readouterr().err
    assert (tmp_path / "p.jsonl").read_text() == ""
    assert run(made, tmp_path / "p.jsonl") == 0
    assert (tmp_path / "p.jsonl").read_bytes() == whole.read_bytes()


def test_a_videos_packets_are_read_once_for_its_questions(made: Path, monkeypatch) -> None:
    read, of = [], Footage.of
    monkeypatch.setattr(answering.Footage, "of", lambda path: read.append(path.name) or of(path))
    model = Model(made / "model", f"{made}/clip", "cpu", 1)
    answerer = answering.Answerer(model, Grounder(lambda text: [], Colours()))
    for name, span in (("0/1_a", (0, 5)), ("0/1_a", (5, 9)), ("2_b", (0, 5)), ("2_b", (20, 25))):
        tube = Tube(name, 0, "Who moves?", (128, 96), 10, span, {})
        line = answerer(tube, made / "videos" / f"{name}.mp4")
    assert read == ["1_a.mp4", "2_b.mp4"]
    assert line.info["error"] == "2_b.mp4: has 20 frames, and the question is about frames 20 to 24"


def test_a_question_that_failed_is_answered_again(made: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    for file in whole.parent.iterdir():
        shutil.copy(file, tmp_path)
    shutil.copytree(made / "videos", tmp_path / "videos")
    write_squares(tmp_path / "videos/3_c.mp4", "red")
    answer, calls = answering.Answerer.__call__, []
    monkeypatch.setattr(answering.Answerer, "__call__", lambda *rest: calls.append(rest) or answer(*rest))
    assert run(made, tmp_path / "p.jsonl", "--videos", f"{tmp_path / 'videos'}") == 0
    assert len(calls) == 1
    before, after = lines(whole), lines(tmp_path / "p.jsonl")
    assert after["3_c"]["info"]["boxes"] and "error" not in after["3_c"]["info"]
    assert list(before) == list(after) and all(before[name] == after[name] for name in ("1_a", "2_b"))


def test_answers_of_other_settings_or_videos_are_refused(made: Path, whole: Path, tmp_path: Path, capsys) -> None:
    for file in whole.parent.iterdir():
        shutil.copy(file, tmp_path)
    assert run(made, tmp_path / "p.jsonl", "--every", "1") == 1
    assert "made with every 0.4, not every 1.0" in capsys.readouterr().err
    write_squares(tmp_path / "2_b.mp4", "green", "blue")
    assert run(made, tmp_path / "p.jsonl", "--skip-missing", "--videos", f"{tmp_path}") == 1
    assert "holds an answer about another file than" in capsys.readouterr().err


def test_missing_videos_are_refused_or_counted(made: Path, tmp_path: Path, capsys) -> None:
    names = ("2_b", "4_d")
    assert run(made, tmp_path / "p.jsonl", names=names) == 1
    assert "lacks 1 of 2 videos, such as 4_d" in capsys.readouterr().err
    assert run(made, tmp_path / "p.jsonl", "--skip-missing", names=names) == 0
    assert "over 2 questions; 2 without a box" in capsys.readouterr().out
    assert run(made, tmp_path / "p.jsonl", "--skip-missing", names=("4_d",)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "m"], "--model and --videos belong together"),
        (
            ["--every", "1", "--overwrite"],
            "--overwrite and --every: without --model the boxes are those in --predictions",
        ),
    ],
)
def test_wrong_flags_are_one_sentence(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--predictions", "p.jsonl", "--ground-truth", "g.json"]
    assert status_of(main, ["spatial", "--benchmark", "hc_stvg", *files, *flags]) == 2
    assert message in capsys.readouterr().err
