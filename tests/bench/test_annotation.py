"""The labelled walkers of vtest.avi."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bench.annotation.labels import CLIP, FIRST_SET, HALVES, Walker, check_clip, clip, read_walkers
from bench.annotation.walkers import METHODS, measure, outcome, total
from dataloaders.records import ABSENT


def test_labels_follow_their_rule() -> None:
    walkers, known = read_walkers(), clip()
    assert len(walkers) >= 20
    assert Counter(walker.half for walker in walkers) == dict(zip(HALVES, (40, 14)))
    for half in HALVES:  # Of the second set, as many leave the picture in either half.
        leave = ["absent" in walker.states for walker in walkers[FIRST_SET:] if walker.half == half]
        assert len(leave) == 14 and sum(leave) == 3
    for walker in walkers:
        assert len(walker.states) == 17 and walker.frames[-1] == walker.frame + 80 < known["frames"]
        assert walker.states[0] == "visible" and "absent" not in walker.states[:4]  # In the picture for 2 s.
        seen = np.array([state == "visible" for state in walker.states])
        assert np.isfinite(walker.boxes[seen]).all() and np.isnan(walker.boxes[~seen]).all()
        left, top, right, bottom = walker.boxes[seen].T
        assert (left >= 0).all() and (top >= 0).all()
        assert (right <= known["width"]).all() and (bottom <= known["height"]).all()
        assert (right - left > 8).all() and (bottom - top > 1.2 * (right - left)).all()  # People stand upright.
    places = [(walker.frame, walker.boxes[0, 0]) for walker in walkers]
    for of_set in (places[:FIRST_SET], places[FIRST_SET:]):
        assert of_set == sorted(of_set)


def test_another_video_is_refused(tmp_path) -> None:
    (tmp_path / "other.avi").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"other\.avi is not the labelled video; it is in Debian opencv-doc"):
        check_clip(tmp_path / "other.avi")


def test_key_points_are_counted_by_the_states_of_the_labels() -> None:
    """A made-up walker: visible, visible, visible, part, absent, absent; points in the box, then off it, then gone."""
    boxes = np.full((6, 4), np.nan)
    boxes[:3] = (10, 10, 30, 50)
    walker = Walker(0, 0, boxes, ("visible", "visible", "visible", "part", "absent", "absent"))
    tracks = np.tile(np.array([20.0, 30.0]) / 100, (3, 6, 1)) + np.arange(3)[:, None, None] / 100
    tracks[:, 2] = 0.9
    tracks[:, 5] = ABSENT
    found = outcome(walker, tracks.astype(np.float32), np.array([100, 100]))
    assert (found.kept, found.visible, found.inside, found.gone, found.absent) == (True, 6, 3, 6, 3)
    assert found.marks == "30p!-"
    tracks[:, 1:] = ABSENT  # Present in a sixth of the moments.
    lost = outcome(walker, tracks.astype(np.float32), np.array([100, 100]))
    assert (lost.kept, lost.visible, lost.inside, lost.gone, lost.marks) == (False, 6, 0, 0, "..p--")
    assert total([found, lost]) == {"kept": 0.5, "inside": 0.25, "absent": 0.5}
    assert outcome(walker, None, np.array([100, 100])) == lost


def test_a_walker_of_the_real_clip_is_followed() -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-contrib-python-headless")
    if not CLIP.exists():
        pytest.skip("vtest.avi is not installed: apt install opencv-doc")
    check_clip(CLIP)
    walker = read_walkers()[8]
    (found,) = measure(CLIP, [walker], METHODS["annotation"])
    assert found.kept and found.inside > 0.8 * found.visible
    (lost,) = measure(CLIP, [walker], METHODS["Lucas-Kanade"])
    assert not lost.kept


def test_a_walkers_score_is_the_mean_over_visible_labels() -> None:
    from bench.annotation.grounded import overlap
    from pite.ground.objects import Detection, Object

    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 20], [5, 5, 6, 6], [0, 0, 10, 10]], float)
    walker = Walker(0, 0, boxes, ("visible", "visible", "part", "visible"))
    still = Object("person", {frame: Detection("person", np.array([0.0, 0, 10, 10]), 1) for frame in (0, 10)})
    assert overlap([still], walker) == pytest.approx((1 + 0.5 + 0) / 3)
    assert overlap([], walker) == 0
