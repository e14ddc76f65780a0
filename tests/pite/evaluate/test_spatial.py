"""Spatial grounding on small files in the published forms of VidSTG, VidOR and HC-STVG, with scores computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pite.evaluate.__main__ import main
from pite.evaluate.spatial import Tube, overlap, read_answers, read_hc_stvg, read_vidstg, report, sampled

FOUND = {2: [[0, 0, 10, 10]], 3: [[5, 0, 15, 10]], 4: [[20, 20, 30, 30], [0, 0, 10, 5]], 5: []}
"""Predicted boxes by frame where the true one is always (0, 0, 10, 10): IoU 1, 1/3, 1/2, 0."""


def tube(span: tuple[int, int] = (2, 6), fps: float = 10) -> Tube:
    boxes = {frame: np.array([0.0, 0, 10, 10]) for frame in range(*span)}
    return Tube("100", 0, "who?", (64, 48), fps, span, boxes)


def as_boxes(found: dict[int, list[list[int]]], scale: float = 1) -> dict[int, np.ndarray]:
    return {frame: scale * np.array(each, float).reshape(-1, 4) for frame, each in found.items()}


def line(query_id: int, boxes: dict[int, list[list[int]]]) -> dict[str, Any]:
    info = {"size": [64, 48], "boxes": {str(frame): each for frame, each in boxes.items()}}
    return {"video_id": "100", "task": "spatial_grounding", "query_id": query_id, "answer": "A man.", "info": info}


@pytest.fixture
def vidstg(tmp_path: Path) -> tuple[Path, Path]:
    """Two records about one video: a declarative sentence and two questions, then one question."""

    def record(begin: int, end: int, captions: int, targets: list[int]) -> dict[str, Any]:
        return {
            "vid": "100",
            "fps": 10,
            "frame_count": 8,
            "width": 64,
            "height": 48,
            "used_segment": {"begin_fid": 0, "end_fid": 7},
            "temporal_gt": {"begin_fid": begin, "end_fid": end},
            "captions": [{"description": "a man runs.", "type": "person", "target_id": 0}] * captions,
            "questions": [{"description": "who runs?", "type": "person", "target_id": t} for t in targets],
        }

    def box(tid: int, edges: tuple[int, int, int, int]) -> dict[str, Any]:
        named = dict(zip(("xmin", "ymin", "xmax", "ymax"), edges))
        return {"tid": tid, "bbox": named, "generated": 0, "tracker": "none"}

    vidor = tmp_path / "vidor" / "0000"
    vidor.mkdir(parents=True)
    frames = [[box(0, (0, 0, 10, 10)), *([box(1, (4, 4, 8, 8))] if 3 <= i < 5 else [])] for i in range(8)]
    (vidor / "100.json").write_text(json.dumps({"video_id": "100", "trajectories": frames}))
    annotations = tmp_path / "test_annotations.json"
    annotations.write_text(json.dumps([record(2, 6, 1, [0, 1]), record(0, 2, 1, [0])]))
    return annotations, tmp_path / "vidor"


@pytest.fixture
def hc_stvg(tmp_path: Path) -> Path:
    """A video of version 2 and one of version 1."""
    boxes = [[0, 0, 10, 10], [10, 0, 10, 10]]
    second = {"bbox": boxes, "st_frame": 3, "img_num": 100, "img_size": [48, 64], "English": "The man goes."}
    first = {"bbox": boxes, "st_frame": 1, "img_num": 500, "width": 64, "height": 48, "caption": "A woman."}
    path = tmp_path / "val_v2.json"
    path.write_text(json.dumps({"55_a.mp4": second, "7_b.mkv": first}))
    return path


def test_the_best_box_of_each_annotated_frame_counts() -> None:
    assert overlap(tube(), (64, 48), as_boxes(FOUND)) == pytest.approx((1 + 1 / 3 + 1 / 2 + 0) / 4)


def test_published_looks_at_five_frames_a_second_and_ends_boxes_before_their_last_pixel() -> None:
    assert sampled(tube()) == [2, 4]
    assert overlap(tube(), (64, 48), as_boxes(FOUND), "published") == pytest.approx((0.81 + 0.36) / 2)


def test_published_looks_at_a_hundred_frames_at_most() -> None:
    assert sampled(tube((0, 400))) == list(range(0, 400, 4))
    assert sampled(tube((1, 13), fps=30)) == [1, 6, 12]  # int(1/6) = 0, int(6/6) = 1, int(12/6) = 2


def test_boxes_of_frames_of_another_size_are_scaled() -> None:
    assert overlap(tube(), (32, 24), as_boxes(FOUND, 0.5)) == pytest.approx(overlap(tube(), (64, 48), as_boxes(FOUND)))


def test_questions_of_vidstg_have_the_published_numbers(vidstg: tuple[Path, Path]) -> None:
    tubes = read_vidstg(*vidstg)
    assert [(t.query_id, t.span, sorted(t.boxes)) for t in tubes] == [
        (0, (2, 6), [2, 3, 4, 5]),
        (1, (2, 6), [3, 4]),
        (3, (0, 2), [0, 1]),
    ]
    assert tubes[1].boxes[3].tolist() == [4, 4, 8, 8]


def test_hc_stvg_counts_frames_from_one(hc_stvg: Path) -> None:
    strict, published = read_hc_stvg(hc_stvg), read_hc_stvg(hc_stvg, protocol="published")
    assert [(t.video, t.span, t.fps, t.size) for t in strict] == [
        ("55_a", (2, 4), 5, (64, 48)),
        ("7_b", (0, 2), 25, (64, 48)),
    ]
    assert strict[0].boxes[3].tolist() == [10, 0, 20, 10]
    found = {frame: box[None] for frame, box in strict[0].boxes.items()}
    assert overlap(strict[0], (64, 48), found) == 1
    assert overlap(published[0], (64, 48), found, "published") == 0


def test_videos_without_a_question_are_left_out_as_published(hc_stvg: Path, tmp_path: Path) -> None:
    (tmp_path / "qa").mkdir()
    (tmp_path / "qa" / "0.json").write_text(json.dumps({"Q": "Who goes?", "A": "The man"}))
    tubes = read_hc_stvg(hc_stvg, tmp_path / "qa")
    assert [t.question for t in tubes] == ["Who goes?", "A woman."]
    answers = {0: ((64, 48), {frame: box[None] for frame, box in tubes[0].boxes.items()})}
    assert report(answers, tubes).numbers["m_sIoU"] == 50
    assert report(answers, tubes, protocol="published").numbers["questions"] == 1


def test_the_command_counts_failures_as_zero(vidstg: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    predictions = tmp_path / "p.jsonl"
    predictions.write_text(f"{json.dumps(line(0, FOUND | {4: FOUND[4][1:]}))}\n{json.dumps(line(3, {}))}\n")
    flags = ["--ground-truth", f"{vidstg[0]}", "--vidor", f"{vidstg[1]}", "--predictions", f"{predictions}"]
    assert main(["spatial", "--benchmark", "vidstg", *flags, "--metrics", f"{tmp_path}/m.json"]) == 0
    assert "over 3 questions; 2 without a box" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "m.json").read_text())["spatial_grounding"]
    assert numbers["m_sIoU"] == pytest.approx(100 * 11 / 24 / 3)
    assert numbers["m_sIoU of the first box kept still"] == 100
    assert numbers["m_sIoU of the whole frame"] == pytest.approx(100 * (100 + 16 + 100) / 3 / (64 * 48))
    assert numbers["boxes per frame"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_id": 9}, "field 'query_id' is 9"),
        ({"video_id": "7"}, "but question 0 is about '100'"),
        ({"info": {"boxes": {}}}, "field 'info.size'"),
        ({"info": {"size": [64, 48], "boxes": {"2": [[1, 2, 3]]}}}, "field 'info.boxes[2]'"),
        ({"info": {"size": [64, 48], "boxes": {"x": []}}}, "field 'info.boxes[x]'"),
        (line(0, FOUND), "frame 4 has 2 boxes, and the best of them would count: give one box a frame"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    record = line(0, {}) | change
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"p\.jsonl:1: ") as error:
        read_answers(tmp_path / "p.jsonl", [tube()])
    assert message in str(error.value)


def test_published_takes_many_boxes_a_frame(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(line(0, FOUND)))
    read = read_answers(tmp_path / "p.jsonl", [tube()], "published")
    found = report(read, [tube()], protocol="published")
    assert found.numbers["m_sIoU"] == pytest.approx(100 * (0.81 + 0.36) / 2)
    assert "1.33 boxes in each frame" in found.text


def test_malformed_ground_truth_is_named(vidstg: tuple[Path, Path], hc_stvg: Path, tmp_path: Path) -> None:
    records = json.loads(vidstg[0].read_text())
    records[1]["temporal_gt"] = {"begin_fid": 90, "end_fid": 95}
    vidstg[0].write_text(json.dumps(records))
    with pytest.raises(ValueError, match="record 1: VidOR has no box of target 0 in frames 90 to 94"):
        read_vidstg(*vidstg)
    records[0]["vid"] = "200"
    vidstg[0].write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"record 0: .* holds no 200\.json"):
        read_vidstg(*vidstg)
    videos = json.loads(hc_stvg.read_text())
    videos["55_a.mp4"]["bbox"] = [[1, 2]]
    hc_stvg.write_text(json.dumps(videos))
    with pytest.raises(ValueError, match=r"55_a\.mp4.*bbox\[0\]: expected 4 numbers"):
        read_hc_stvg(hc_stvg)
