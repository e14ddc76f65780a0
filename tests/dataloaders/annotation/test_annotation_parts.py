"""The parts of annotation one by one: masks, key points, answers, and points tracked over textures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataloaders.annotation import steps
from dataloaders.annotation.key_points import key_points
from dataloaders.annotation.record import pite_record
from dataloaders.annotation.report import measure, table
from dataloaders.annotation.steps import Phrase
from dataloaders.annotation.tracking import Moments, track_events
from dataloaders.formats import read_pite
from dataloaders.formats.activitynet import Event, EventVideo
from dataloaders.records import ABSENT, RecordError
from dataloaders.synthetic.render import write_mp4

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-contrib-python-headless")


def test_masks_are_in_cocos_run_length_encoding():
    mask = np.array([[0, 1, 1], [1, 1, 0]], bool)
    assert steps.encode_mask(mask) == {"size": [2, 3], "counts": [1, 4, 1]}
    assert steps.encode_mask(~mask) == {"size": [2, 3], "counts": [0, 1, 4, 1]}
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 3), (17, 40)):
        for share in (0, 0.3, 1):
            mask = rng.random(shape) < share
            assert (steps.decode_mask(steps.encode_mask(mask), "") == mask).all()
    with pytest.raises(RecordError, match=r"^here: expected .*counts"):
        steps.decode_mask({"size": [2, 2], "counts": "0Q1"}, "here")


def test_key_points_represent_clusters_of_equal_motion():
    rng = np.random.default_rng(0)
    ways = np.array([[0.2, 0.0], [0.0, 0.2], [-0.1, -0.1]])
    origin = np.array([[0.3, 0.3], [0.5, 0.5], [0.8, 0.7]])
    time = np.linspace(0, 1, 9)[:, None]
    tracks = np.concatenate([o + w * time + rng.normal(0, 0.004, (20, 1, 2)) for o, w in zip(origin, ways)])
    tracks = tracks[rng.permutation(60)]
    tracks[:5, 6:] = ABSENT  # Lost, but still in their cluster.
    points = key_points(tracks, 3)
    assert points is not None
    assert points == pytest.approx(origin[:, None] + ways[:, None] * time, abs=0.012)
    assert key_points(tracks[:2], 3) is None
    assert key_points(np.zeros((0, 4, 2)), 1) is None
    assert key_points(np.full((5, 4, 2), ABSENT), 3) is None


def test_outliers_are_not_key_points_and_an_approaching_object_has_no_outliers():
    time = np.linspace(0, 1, 9)[:, None]
    grid = np.stack(np.meshgrid(np.linspace(-0.1, 0.1, 5), np.linspace(-0.1, 0.1, 5)), -1).reshape(-1, 1, 2)
    moving = 0.3 + grid + np.array([0.4, 0.2]) * time
    moving[[3, 11]] = moving[[3, 11], :1]  # Two tracks stuck to the background.
    points = key_points(moving, 3)
    assert points is not None
    assert np.ptp(points, axis=1) == pytest.approx(np.tile([0.4, 0.2], (3, 1)))
    nearer = 0.5 + grid * (1 + 2 * time)
    points = key_points(nearer, 4)
    assert points is not None
    assert (
        np.abs(points[:, -1] - 0.5).max(-1) > 0.14
    ).all()  # One in each quarter of the object, whose corners are at 0.3 by then.


def test_key_points_prefer_long_tracks():
    tracks = np.full((6, 10, 2), 0.5) + np.arange(6)[:, None, None] * 0.01
    tracks[:3, 4:] = ABSENT
    points = key_points(tracks, 3)
    assert points is not None and (points != ABSENT).all()
    points = key_points(tracks, 4)  # Too few long tracks: short ones are used as well.
    assert points is not None and (points == ABSENT).any()
    same = key_points(np.tile(tracks[5], (4, 1, 1)), 3)
    assert same is not None and (same == tracks[5]).all()


def test_both_forms_of_an_answer_have_right_marks_and_offsets():
    events = (Event(0.0, 2.0, "Anna waves to a dog."), Event(3.0, 9.0, "The dog sleeps..."))
    video = EventVideo("x", "x", 10.0, events)
    phrases = [[Phrase("Anna", 0), Phrase("a dog.", 14)], [Phrase("The dog", 0)]]
    points = {(0, 1): np.full((3, 2, 2), 0.5), (1, 0): np.array([[[0.25, 0.12345], [ABSENT, ABSENT]]] * 3)}
    answers = set()
    for name in ("clip0", "clip1", "clip2", "clip3"):
        record = pite_record(name, "captions", video, phrases, points)
        answers.add(record["conversations"][1]["value"])
        assert [t["phrase"].lower() for t in record["trajectories"]] == ["a dog", "the dog"]
        assert record["trajectories"][1]["points"][0] == [[0.25, 0.1235], [-1, -1]]
        sample = read_pite(record, name, Path("stage2"), num_frames=10, num_points=3)
        spans = [sample.turns[0].answer[m.start : m.end].lower() for m in sample.turns[0].mentions]
        assert spans == ["a dog", "the dog"]
    assert answers == {
        "From <s0> to <e0>, Anna waves to a dog. From <s1> to <e1>, the dog sleeps.",
        "Anna waves to a dog, from <s0> to <e0>. The dog sleeps, from <s1> to <e1>.",
    }
    with pytest.raises(RecordError, match="holds no text"):
        pite_record("a", "captions", EventVideo("x", "x", 1.0, (Event(0.0, 1.0, "..."),)), [[]], {})


def test_texture_is_tracked_over_another_texture(tmp_path):
    rng = np.random.default_rng(0)
    background, thing = (rng.integers(0, 256, (n, n, 3), np.uint8).repeat(4, 0).repeat(4, 1) for n in (48, 12))
    frames = np.tile(background, (40, 1, 1, 1))
    path = np.stack((np.arange(40) * 3 + 10, np.arange(40) * 2 + 20), -1)
    for frame, (x, y) in zip(frames, path):
        frame[y : y + 48, x : x + 48] = thing
    write_mp4(tmp_path / "t.mp4", frames)
    mask = np.zeros((192, 192), bool)
    mask[20:68, 10:58] = True
    moments = Moments.of(Event(0.0, 4.0, ""), 4.0, 40, 40)
    tracks = track_events(tmp_path / "t.mp4", [moments], [[mask]])[0, 0]
    points = key_points(tracks, 3)
    assert points is not None
    error = (points - points[:, :1]) * 192 - (path - path[0])
    assert (points[:, -1] != ABSENT).all()
    assert np.abs(error).max() < 1.0  # Pixels, after 39 steps.
    # A point is at the centre of its pixel.
    mask[:] = False
    mask[40, 30] = True
    (track,) = track_events(tmp_path / "t.mp4", [moments], [[mask]])[0, 0]
    assert track[0] * 192 == pytest.approx([30.5, 40.5])


def test_nothing_is_tracked_across_a_cut(tmp_path):
    scenes = np.random.default_rng(0).integers(60, 200, (2, 24, 32, 3), np.uint8).repeat(5, 1).repeat(5, 2)
    write_mp4(tmp_path / "cut.mp4", scenes.repeat(6, 0))
    mask = np.zeros((120, 160), bool)
    mask[20:90, 30:120] = True
    moments = Moments.of(Event(0.0, 1.2, ""), 1.2, 12, 12)
    seen = (track_events(tmp_path / "cut.mp4", [moments], [[mask]])[0, 0] != ABSENT).all(-1)
    assert len(seen) > 30
    assert seen[:, :6].mean() > 0.95
    assert not seen[:, 6:].any()


def test_moments_are_as_dense_as_a_models_frames():
    whole = Moments.of(Event(0.0, 10.0, ""), 10.0, 300, 100)
    assert len(whole.frames) == 100 and (whole.first, whole.last) == (0, 299)
    part = Moments.of(Event(2.0, 4.1, ""), 10.0, 300, 100)
    assert len(part.frames) == 22 and (np.diff(part.frames) <= 4).all()
    assert Moments.of(Event(5.0, 5.0, ""), 10.0, 1, 100).frames.tolist() == [0]


def test_the_table_shows_whether_only_what_stands_still_was_kept():
    way = np.linspace((0.2, 0.5), (0.5, 0.9), 5)[None].repeat(3, 0)
    moving, still, lost = way.copy(), way[:, :1].repeat(5, 1), way.copy()
    moving[0, 3:] = ABSENT
    lost[:, 1:] = ABSENT
    measured = [
        measure(*each, 0.3) for each in (("A man", moving), ("a man", lost), ("a car", still), ("the car", still))
    ]
    assert (measured[0].present, measured[0].lost) == (0.8667, False)
    assert measured[0].moved == pytest.approx((0.25 + 0.5 + 0.5) / 3, abs=1e-4)
    assert (measured[1].present, measured[1].moved, measured[1].lost) == (0.2, 0.0, True)
    head, everything, men, *cars, note = table(measured).splitlines()
    assert head.split() == ["phrase", "number", "lost", "present", "moved", "still"]
    assert everything.split() == ["all", "phrases", "4", "25%", "100%", "0.000", "67%"]
    assert men.split() == ["a", "man", "2", "50%", "87%", "0.417", "0%"]
    assert [car.split()[2:] for car in cars] == [["1", "0%", "100%", "0.000", "100%"]] * 2
    assert "moved less than 0.02" in note
    assert table([measured[1]]).splitlines()[1].split()[-3:] == ["-", "-", "-"]
    assert table([]) == "no phrase has a trajectory"
