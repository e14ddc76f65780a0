"""Grounding of moving squares, which a detector by colour finds: identities, files, order, kills."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from dataloaders.annotation.boxes import box_ious
from dataloaders.annotation.steps import Phrase, decode_mask
from dataloaders.annotation.tracking import frames_until
from pite.ground import command
from pite.ground.__main__ import main
from pite.ground.flags import GroundFlags
from pite.ground.grounding import Grounder
from pite.ground.matching import plain
from pite.ground.objects import Detection, Object, join
from pite.ground.overlay import _moved
from tests.pite.ground.squares import Colours, Squares, parse, place, write_squares


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One video with a red and a blue square, one with a green one."""
    folder = tmp_path_factory.mktemp("squares")
    return [write_squares(folder / "a.mp4", "red", "blue"), write_squares(folder / "b.mp4", "green")]


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
        assert list(boxes) == list(range(20))
        assert min(box_ious(box[None], place(colour, frame))[0] for frame, box in boxes.items()) > 0.7
        masks = {frame: decode_mask(found.mask, "mask") for frame, found in each.found.items()}
        assert list(masks) == [0, 4, 8, 12, 16, 19] and all(400 < mask.sum() < 600 for mask in masks.values())


def test_grabcut_finds_a_mask_in_a_box_without_one(videos: list[Path]) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-python-headless")
    grounded = Grounder(parse, Colours(masked=False))(videos[1], "a green square")
    for frame, found in grounded.objects[0].found.items():
        left, top, right, bottom = place("green", frame).astype(int)
        mask = decode_mask(found.mask, "mask")
        assert mask[top:bottom, left:right].mean() > 0.5 and mask.sum() <= mask[top:bottom, left:right].sum()


def test_a_part_of_a_video(videos: list[Path]) -> None:
    grounded = Grounder(parse, Colours(), every=0.2)(videos[0], TEXT, (0.5, 1.2))
    assert grounded.span == (5, 12) and list(grounded.objects[0].boxes()) == list(range(5, 12))
    with pytest.raises(
        ValueError, match=r"a\.mp4: no frame is between 5 and 6 s; the first is at 0\.00 s, the last at 1\.9"
    ):
        Grounder(parse, Colours())(videos[0], TEXT, (5, 6))


def test_times_of_uneven_frames_are_their_own(tmp_path: Path) -> None:
    """Ten frames in the first second, and two in the ten seconds after it."""
    with av.open(str(tmp_path / "uneven.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for moment in (*range(10), 50, 100):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    looked_at: list[np.ndarray] = []

    class Counting(Colours):
        def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]:
            looked_at.append(image)
            return []

    assert Grounder(parse, Counting(), every=0.5)(tmp_path / "uneven.mkv", TEXT, (4, 20)).span == (10, 12)
    assert len(looked_at) == 2
    looked_at.clear()
    assert Grounder(parse, Counting(), every=0.5)(tmp_path / "uneven.mkv", TEXT).span == (0, 12)
    assert len(looked_at) == 4, "0 s, 0.5 s, 5 s and 10 s"


def test_later_mentions_and_the_same_thing_under_two_tags(videos: list[Path]) -> None:
    """A detector that finds a square by any words that end in "square"."""

    class Vague(Colours):
        def tags(self, phrases: Sequence[str]) -> list[str]:
            return [plain(phrase) for phrase in phrases]

        def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]:
            (red,) = Colours.__call__(self, image, ["red square"])
            return [Detection(tag, red.box, 0.9) for tag in tags]

    text = "a red square, the square, a big square"
    grounded = Grounder(parse, Vague())(videos[0], text)
    assert [(p.text, own) for p, own in grounded.phrases] == [
        ("a red square", (0,)), ("the square", (0,)), ("a big square", ())
    ]  # fmt: skip
    assert [each.tag for each in grounded.objects] == ["red square"]


def test_a_plural_has_the_objects_of_each_thing_it_mentions(videos: list[Path]) -> None:
    def squares(text: str) -> list[Phrase]:
        return [Phrase(match[0], match.start()) for match in re.finditer(r"(?:a|another|the) squares?", text)]

    grounded = Grounder(squares, Squares())(videos[0], "a square, another square, the squares")
    assert [own for _, own in grounded.phrases] == [(0,), (1,), (0, 1)]


def test_a_number_of_objects(videos: list[Path]) -> None:
    texts = ("two squares and a square", "a square and two squares", "the squares")
    found = [[own for _, own in Grounder(parse, Squares())(videos[0], text).phrases] for text in texts]
    assert found == [[(0, 1), ()], [(0,), (1,)], [(0, 1)]]


def test_a_mask_leaves_the_frame_at_its_edges() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 4:6] = True
    assert np.argwhere(_moved(mask, np.array([1, 0, 1, 0]))).tolist() == [[1, 5], [2, 5]]
    assert np.argwhere(_moved(mask, np.array([0, -2, 0, -2]))).tolist() == [[0, 4], [0, 5]]
    assert not _moved(mask, np.array([9, 9, 9, 9])).any() and (_moved(mask, np.zeros(4)) == mask).all()


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
    assert "a red square: frames 0 to 19\n" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_atomically", killed)
        assert run(tmp_path / "cut") != 0
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["a.mp4"]
    assert run(tmp_path / "cut") == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert whole.keys() == {"a.json", "a.mp4", "b.json", "b.mp4"}
    assert {file.name: file.read_bytes() for file in (tmp_path / "cut").iterdir()} == whole
    assert json.loads(whole["a.json"])["phrases"][2] == {"phrase": "the red square", "start": 40, "objects": [0]}
    assert sum(1 for _ in frames_until(tmp_path / "whole" / "a.mp4", set(range(20)))) == 20
    (tmp_path / "cut" / "a.mp4").unlink()
    assert run(tmp_path / "cut") == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "cut").iterdir()} == whole
    assert run(tmp_path / "cut", "--every", "1") == 1
    assert "made with other settings" in capsys.readouterr().err
    (tmp_path / "cut" / "b.json").write_text("{")
    assert run(tmp_path / "cut") == 1
    assert "b.json: not written by pite.ground, or damaged" in capsys.readouterr().err


def test_another_video_of_the_same_name_is_refused(videos, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "open_grounder", lambda flags: Grounder(parse, Colours()))
    video = tmp_path / "a.mp4"
    flags = ["--video", str(video), "--answer", TEXT, "--output", str(tmp_path / "out")]
    shutil.copy(videos[0], video)
    assert main(flags) == 0
    shutil.copy(videos[1], video)
    assert main(flags) == 1
    assert "a.json was made from another video than" in capsys.readouterr().err


def test_a_bad_video_does_not_end_the_run(videos, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "open_grounder", lambda flags: Grounder(parse, Colours()))
    (tmp_path / "0.mp4").write_bytes(b"no video")
    flags = ["--answer", TEXT, "--output", str(tmp_path / "out")]
    assert main(["--video", str(tmp_path / "0.mp4"), str(videos[1]), *flags]) == 1
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"b.json", "b.mp4"}
    assert "1 of 2 videos failed; the first: " in capsys.readouterr().err


def test_the_files_depend_on_what_the_models_folders_hold(tmp_path: Path) -> None:
    detector = tmp_path / "detector"
    detector.mkdir()
    flags = GroundFlags(video=(Path("a.mp4"),), output=tmp_path, answer="A dog.", detector=detector)
    before = command._settings(flags)
    (detector / "model.safetensors").write_bytes(b"weights")
    assert command._settings(flags) != before


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
        (["--answer", "A dog.", "--query", "Who?"], "--query: --answer is grounded without a model"),
        (["--answer", "A dog.", "--model", "m"], "--model: --answer is grounded without a model"),
        (["--answer", "A dog.", "--clip", "c", "--max-new-tokens", "9"], "--clip and --max-new-tokens: --answer is"),
        (["--answer", "A dog.", "--threshold", "0.5"], "--threshold is for the scores of --detector"),
        (["--answer", "A dog.", "--detector", ".", "--threshold", "2"], "--threshold must be between 0 and 1"),
        (["--answer", "A dog.", "--segmenter", "."], "--segmenter needs the boxes"),
        (["--answer", "A dog.", "--seconds", "3", "2"], "--seconds must be a start and a later end"),
        (["--answer", "A dog.", "--every", "0"], "--every must be more than 0"),
    ],
)
def test_wrong_flags_are_one_sentence(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--video", "a.mp4", "--output", "out", *flags])
    assert message in capsys.readouterr().err
