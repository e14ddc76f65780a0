"""An object that was hidden for long and comes back elsewhere is found again by the detector and its colours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dataloaders.annotation import steps
from dataloaders.annotation.__main__ import main
from dataloaders.annotation.models import Found
from dataloaders.annotation.objects import track_all
from dataloaders.annotation.refinding import refind
from dataloaders.annotation.steps import Masks, Phrase
from dataloaders.annotation.tracking import Moments
from dataloaders.records import ABSENT
from dataloaders.synthetic.render import write_mp4
from tests.commands import status_of
from tests.dataloaders.annotation.test_objects import COAT, HEIGHT, RNG, STRANGER, TROUSERS, WIDTH, walker

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-contrib-python-headless")

LAST, GONE, BACK = 48, 12, 36


@dataclass
class Difference:
    """A detector of everything that is not the background, such as people on a street."""

    background: np.ndarray

    def __call__(self, image: np.ndarray, phrases: Sequence[str]) -> list[np.ndarray | None]:
        raise AssertionError("only the first frame has masks, and they are given")

    def find_all(self, image: np.ndarray, phrases: Sequence[str]) -> list[list[Found]]:
        changed = np.abs(image.astype(int) - self.background).max(-1) > 40
        closed = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((7, 7), np.uint8))
        _, _, statistics, _ = cv2.connectedComponentsWithStats(closed)
        things = [(x, y, x + w, y + h) for x, y, w, h, area in statistics[1:].tolist() if area > 200]
        return [[(np.array(thing, float), 1.0, None) for thing in things] for _ in phrases]


def street(path: Path, twin: bool) -> np.ndarray:
    """Frames 0 to 11: a walker goes left and behind a wall; from 36 on it comes from the right. A stranger stays."""
    background = RNG.integers(110, 150, (HEIGHT // 4, WIDTH // 4, 1), np.uint8).repeat(3, 2).repeat(4, 0).repeat(4, 1)
    background[:, :60] = 220
    frames = np.tile(background, (LAST + 1, 1, 1, 1))
    for k, frame in enumerate(frames):
        walker(frame, 80 + k, 44, STRANGER, STRANGER)
        if k < GONE or k >= BACK:
            walker(frame, left_of(k), 40, COAT, TROUSERS)
        if twin and k >= BACK:
            walker(frame, 150, 70, COAT, TROUSERS)
        frame[:, :60] = 220
    write_mp4(path, frames)
    return background


def left_of(frame: int) -> int:
    return 124 - 6 * frame if frame < BACK else 218 - 4 * (frame - BACK)


def tracks_of(path: Path, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (M, K, 2) before and after the search, at each frame."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[40:80, 124:140] = True
    moments, masks = [Moments(np.arange(LAST + 1))], [[mask]]
    phrases = [[Phrase("A walker", 0)]]
    before = track_all(path, moments, masks)
    again = refind(path, moments, masks, phrases, before, Difference(background))
    return before[0, 0], again[0, 0]


def test_a_walker_who_comes_back_elsewhere_is_found_again(tmp_path) -> None:
    before, again = tracks_of(tmp_path / "street.mp4", street(tmp_path / "street.mp4", twin=False))
    present = (again != ABSENT).all(-1)
    assert (before[:, BACK:] == ABSENT).all()  # Its way does not lead there.
    assert not present[:, GONE + 2 : BACK].any()
    assert (again[:, :GONE] == before[:, :GONE]).all()
    lefts = np.array([left_of(k) for k in range(LAST + 1)])
    x, y = again[..., 0] * WIDTH, again[..., 1] * HEIGHT
    inside = present & (x >= lefts - 2) & (x <= lefts + 18) & (y >= 38) & (y <= 82)
    assert inside[:, BACK + 6 :].mean() > 0.9


def test_of_two_in_the_same_clothes_neither_is_chosen(tmp_path) -> None:
    before, again = tracks_of(tmp_path / "street.mp4", street(tmp_path / "street.mp4", twin=True))
    assert (again == before).all()


def test_nothing_is_looked_for_while_all_objects_are_present(tmp_path) -> None:
    tracks = {(0, 0): np.full((4, 5, 2), 0.5, np.float32)}
    masks: Masks = [[np.ones((4, 4), bool)]]
    detector = Difference(np.zeros((4, 4, 3)))
    found = refind(tmp_path / "none.mp4", [Moments(np.arange(5))], masks, [[Phrase("a", 0)]], tracks, detector)
    assert found is tracks


def test_the_command_refinds_on_request_and_repeats_without_the_detector(tmp_path, monkeypatch, capsys) -> None:
    background = street(tmp_path / "v0.mp4", twin=False)
    captions = {"v0": {"duration": 4.9, "timestamps": [[0, 4.9]], "sentences": ["A walker leaves."]}}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[40:80, 124:140] = True
    work = tmp_path / "out.steps"
    event = {"sentence": "A walker leaves.", "phrases": [{"phrase": "A walker", "start": 0}]}
    steps.write_json(steps.step_path(work, "phrases", "v0"), {"events": [event]})
    steps.write_masks(steps.step_path(work, "masks", "v0"), [[mask]])
    for module in ("pipeline", "run"):
        monkeypatch.setattr(f"dataloaders.annotation.{module}.PeopleDetector", lambda: Difference(background))

    def run(*flags: object) -> int:
        paths = ["--captions", tmp_path / "captions.json", "--videos", tmp_path, "--output", tmp_path / "out.jsonl"]
        return status_of(main, [*map(str, [*paths, "--num-frames", LAST + 1, "--workers", 0, "--sheets", 0, *flags])])

    assert run("--refind", "--tracker", tmp_path) == 2
    assert "leave out --tracker, or --refind" in capsys.readouterr().err
    assert run("--refind") == 1
    assert "--refind needs --detector or --people: 1 of 1 videos have no file of tracks" in capsys.readouterr().err
    assert run("--refind", "--people") == 0
    track = steps.read_tracks(steps.step_path(work, "tracks", "v0"), [[Phrase("A walker", 0)]])[0, 0]
    assert (track[:, BACK + 6 :] != ABSENT).any()
    assert run("--refind") == run("--refind", "--people") == 0
    assert run("--people") == 1
    assert "'refinding': {'looks': 6" in capsys.readouterr().err, "these tracks were made otherwise"
    shutil.rmtree(work / "tracks")
    shutil.rmtree(work / "records")
    assert run("--people") == run() == 0
    track = steps.read_tracks(steps.step_path(work, "tracks", "v0"), [[Phrase("A walker", 0)]])[0, 0]
    assert (track[:, BACK + 6 :] == ABSENT).all(), "it is off by default"
