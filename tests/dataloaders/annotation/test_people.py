"""OpenCV's people detector, where it is installed, and the phrases that it is for."""

from __future__ import annotations

import numpy as np
import pytest

from bench.annotation.labels import CLIP, read_walkers
from dataloaders.annotation.flags import AnnotationFlags
from dataloaders.annotation.people import PeopleDetector, names_person
from dataloaders.annotation.tracking import opencv
from dataloaders.decode.video import iter_frames

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-contrib-python-headless")


def test_phrases_that_name_a_person() -> None:
    assert all(map(names_person, ("A man", "the two women", "Three young people", "a skier")))
    assert not any(map(names_person, ("a dog", "the man's hat", "a snowman", "", "42")))


def test_one_detector_is_chosen(tmp_path) -> None:
    with pytest.raises(ValueError, match="give one of --detector and --people"):
        AnnotationFlags(captions=tmp_path, videos=tmp_path, output=tmp_path, detector=tmp_path, people=True)


def test_another_opencv_is_refused_with_the_package(monkeypatch) -> None:
    monkeypatch.delattr(opencv(), "HOGDescriptor", raising=False)
    with pytest.raises(ValueError, match="opencv-contrib-python-headless"):
        PeopleDetector()


@pytest.mark.skipif(not hasattr(cv2, "HOGDescriptor"), reason="the detector is in opencv-contrib-python-headless")
def test_people_of_a_real_frame_are_found() -> None:
    if not CLIP.exists():
        pytest.skip("vtest.avi is not installed: apt install opencv-doc")
    frame = next(frame for frame in iter_frames(CLIP, {0}) if frame is not None)
    detector = PeopleDetector()
    boxes = detector.boxes(frame)
    for walker in read_walkers()[:2]:
        low = np.maximum(boxes[:, :2], walker.boxes[0, :2])
        shared = np.prod(np.maximum(np.minimum(boxes[:, 2:], walker.boxes[0, 2:]) - low, 0), -1)
        assert (shared > 0.5 * np.prod(walker.boxes[0, 2:] - walker.boxes[0, :2])).any()
    man, dog, other = detector(frame, ["A man", "a dog", "a woman"])
    assert man is not None and other is not None and dog is None and (man != other).any()
    assert (detector(frame, ["the woman"])[0] == man).all()
    assert detector(np.zeros((120, 160, 3), np.uint8), ["a man"]) == [None]
