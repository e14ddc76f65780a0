"""Grounding of moving squares, which a detector by colour finds: identities, files, order, kills."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from dataloaders.annotation.boxes import box_ious
from dataloaders.annotation.steps import Phrase
from pite.ground import command
from pite.ground.__main__ import main
from pite.ground.grounding import Grounder, frames_of
from pite.ground.objects import Detection, Object, join

pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-python-headless")

SIDE, COLOURS = 24, {"red": 0, "green": 1, "blue": 2}


class Colours:
    """Finds squares of red, green and blue."""

    def tags(self, phrases: Sequence[str]) -> list[str]:
        return [f"{c} square" for c in COLOURS if any(c in phrase for phrase in phrases)]

    def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]:
        found = []
        for tag in tags:
            channel = COLOURS[tag.partition(" ")[0]]
            others = np.delete(image, channel, 2).max(-1)
            rows, columns = np.nonzero((image[..., channel] > 128) & (others < 100))
            if len(rows):
                box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)
                found.append(Detection(tag, box, 0.9))
        return found


def parse(text: str) -> list[Phrase]:
    return [Phrase(match[0], match.start()) for match in re.finditer(r"(?:a|the) \w+ square", text)]


def place(colour: str, frame: int) -> np.ndarray:
    """The true box of a square: red moves right, the others down."""
    left, top = (4 + 3 * frame, 10) if colour == "red" else (40, 4 + 2 * frame)
    return np.array([left, top, left + SIDE, top + SIDE], float)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """20 frames at 10 per second: one video with a red and a blue square, one with a green one."""
    folder = tmp_path_factory.mktemp("squares")
    paths = []
    for name, colours in (("a", ("red", "blue")), ("b", ("green",))):
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for index in range(20):
                picture = np.full((96, 128, 3), 40, np.uint8)
                for colour in colours:
                    left, top, right, bottom = place(colour, index).astype(int)
                    picture[top:bottom, left:right] = np.eye(3)[COLOURS[colour]] * 230
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        paths.append(folder / f"{name}.mp4")
    return paths


TEXT = "a red square passes a blue square, then the red square is near a green square"


def test_phrases_have_the_boxes_and_masks_of_their_objects(videos: list[Path]) -> None:
    grounded = Grounder(parse, Colours(), every=0.4)(videos[0], TEXT)
    assert [(p.text, own) for p, own in grounded.phrases] == [
        ("a red square", (0,)),
        ("a blue square", (1,)),
        ("the red square", (0,)),
        ("a green square", ()),
    ]
    for each, colour in zip(grounded.objects, ("red", "blue")):
        boxes = each.boxes()
        assert list(boxes) == list(range(17))
        assert min(box_ious(box[None], place(colour, frame))[0] for frame, box in boxes.items()) > 0.7
        assert all(found.mask is not None and found.mask.any() for found in each.found.values())


def test_a_part_of_a_video(videos: list[Path]) -> None:
    grounded = Grounder(parse, Colours(), every=0.2)(videos[0], TEXT, (0.5, 1.2))
    assert grounded.span == (5, 12) and list(grounded.objects[0].boxes()) == list(range(5, 12))


def test_the_order_of_videos_changes_nothing(videos: list[Path]) -> None:
    grounder = Grounder(parse, Colours())
    one = [grounder(video, TEXT).as_dict() for video in videos]
    other = [grounder(video, TEXT).as_dict() for video in reversed(videos)]
    assert one == other[::-1]
    assert [[o["tag"] for o in each["objects"]] for each in one] == [["red square", "blue square"], ["green square"]]


def test_a_killed_run_is_continued_to_the_same_files(videos, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "open_grounder", lambda flags: Grounder(parse, Colours()))

    def run(output: Path, *more: str) -> int:
        return main(["--video", *map(str, videos), "--answer", TEXT, "--output", str(output), *more])

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    assert run(tmp_path / "whole") == 0
    assert "a red square: frames 0 to 16\n" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_atomically", killed)
        assert run(tmp_path / "cut") != 0
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["a.mp4"]
    assert run(tmp_path / "cut") == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert whole.keys() == {"a.json", "a.mp4", "b.json", "b.mp4"}
    assert {file.name: file.read_bytes() for file in (tmp_path / "cut").iterdir()} == whole
    assert json.loads(whole["a.json"])["phrases"][2] == {"phrase": "the red square", "start": 40, "objects": [0]}
    assert sum(1 for _ in frames_of(tmp_path / "whole" / "a.mp4", set(range(20)))) == 20
    assert run(tmp_path / "cut", "--every", "1") == 1
    assert "made with other settings" in capsys.readouterr().err


def box(left: float) -> np.ndarray:
    return np.array([left, 0, left + 10, 20], float)


def test_objects_that_pass_each_other_keep_their_identities() -> None:
    paths = [[0, 8, 16, 24, 32], [40, 32, 24, 16, 8]]
    frames = [(5 * k, [Detection("person", box(path[k]), 1) for path in paths]) for k in range(5)]
    frames[2] = (10, [Detection("person", box(16), 1), Detection("person", box(25), 1)])
    found = [[each.box[0] for each in one.found.values()] for one in join(frames)]
    assert sorted(found) == [[0, 8, 16, 24, 32], [40, 32, 25, 16, 8]]


def test_a_gap_is_interpolated_and_chance_is_left_out() -> None:
    frames = [(k, [Detection("dog", box(k), 1)] if k != 2 else []) for k in range(5)]
    frames[1][1].append(Detection("dog", box(80), 0.4))
    frames[3][1].append(Detection("dog", box(4), 0.3))
    one = join(frames)
    assert len(one) == 1 and one[0].boxes()[2].tolist() == box(2).tolist()
    assert isinstance(one[0], Object) and one[0].score == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--query", "Who?"], "give --query and --model, or --answer"),
        (["--answer", " "], "the text is empty"),
        (["--answer", "A dog.", "--segmenter", "."], "--segmenter needs the boxes"),
        (["--answer", "A dog.", "--seconds", "3", "2"], "--seconds must be a start and a later end"),
        (["--answer", "A dog.", "--every", "0"], "--every must be more than 0"),
    ],
)
def test_wrong_flags_are_one_sentence(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--video", "a.mp4", "--output", "out", *flags])
    assert message in capsys.readouterr().err
