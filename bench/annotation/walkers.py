"""What annotation makes of the labelled walkers, by method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.annotation.labels import Walker
from bench.annotation.synthetic import Method
from dataloaders.annotation.boxes import filled
from dataloaders.annotation.key_points import key_points
from dataloaders.annotation.objects import track_all
from dataloaders.annotation.people import PeopleDetector
from dataloaders.annotation.refinding import refind
from dataloaders.annotation.steps import Masks, Phrase, Tracks
from dataloaders.annotation.tracking import Moments, opencv, track_events
from dataloaders.decode.video import iter_frames
from dataloaders.records import ABSENT

POINTS, LOST = 3, 0.3
"""Key points of a trajectory, and the share of moments below which it is lost."""


@dataclass(frozen=True)
class Outcome:
    """Counts of one walker's key points, and a character for each moment after the first.

    kept             whether there is a trajectory that is not lost
    visible, inside  key points at moments in which the walker is visible, and those of them in the labelled box
    gone, absent     key points of a kept walker at moments in which the walker is absent, and those of them absent
    marks            3, 2, 1, 0 key points inside; . none present; - absent rightly; ! present wrongly; p partly visible
    """

    kept: bool
    visible: int
    inside: int
    gone: int
    absent: int
    marks: str


def measure(clip: Path, walkers: Sequence[Walker], method: Method) -> list[Outcome]:
    """Annotate the walkers of a clip from their first boxes."""
    frame = next(frame for frame in iter_frames(clip, {0}) if frame is not None)
    masks: Masks = [[filled(walker.boxes[0], frame.shape)] for walker in walkers]
    tracks = method(clip, [Moments(walker.frames) for walker in walkers], masks)
    size = np.array(frame.shape[1::-1])
    return [outcome(walker, tracks.get((i, 0)), size) for i, walker in enumerate(walkers)]


def outcome(walker: Walker, tracks: np.ndarray | None, size: np.ndarray) -> Outcome:
    """Compare the key points of tracks (M, 17, 2) with the labels of a walker; `size` is the frame's (2,)."""
    points = None if tracks is None else key_points(tracks, POINTS)
    kept = points is not None and (points != ABSENT).all(-1).mean() >= LOST
    if points is None or not kept:
        points = np.full((POINTS, len(walker.states), 2), float(ABSENT))
    counts, marks = np.zeros(4, int), ""
    for k, (state, box) in enumerate(zip(walker.states[1:], walker.boxes[1:]), 1):
        here = (points[:, k] != ABSENT).all(-1)
        place = points[:, k] * size
        inside = here & (place >= box[:2]).all(-1) & (place <= box[2:]).all(-1)
        if state == "visible":
            counts[:2] += POINTS, inside.sum()
            marks += str(inside.sum()) if here.any() else "."
        elif state == "absent":
            counts[2:] += np.array([POINTS, (~here).sum()]) * kept
            marks += "!" if here.any() else "-"
        else:
            marks += "p"
    visible, within, gone, absent = counts.tolist()
    return Outcome(bool(kept), visible, within, gone, absent, marks)


def total(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares over all walkers: kept, inside, absent."""
    visible, gone = sum(each.visible for each in outcomes), sum(each.gone for each in outcomes)
    return {
        "kept": sum(each.kept for each in outcomes) / len(outcomes),
        "inside": sum(each.inside for each in outcomes) / visible,
        "absent": sum(each.absent for each in outcomes) / gone if gone else float("nan"),
    }


def _csrt(clip: Path, moments: Sequence[Moments], masks: Masks) -> Tracks:
    """Points on a grid in the box of opencv-contrib's CSRT, for comparison. It never reports a walker as absent."""
    cv2 = opencv()
    if not hasattr(cv2, "TrackerCSRT_create"):
        raise ValueError("CSRT is in opencv-contrib-python-headless, which replaces opencv-python-headless")
    trackers: dict[int, Any] = {}
    samples: dict[int, list[np.ndarray]] = {i: [] for i in range(len(moments))}
    wanted = {frame for each in moments for frame in range(each.first, each.last + 1)}
    grid = np.stack(np.meshgrid((0.35, 0.5, 0.65), (0.25, 0.5, 0.75)), -1).reshape(-1, 2)
    for index, frame in enumerate(iter_frames(clip, wanted)):
        for i, each in enumerate(moments):
            if frame is None or not each.first <= index <= each.last:
                continue
            picture = frame[..., ::-1].copy()
            if index == each.first:
                box = _box(masks[i][0])
                trackers[i] = cv2.TrackerCSRT_create()
                trackers[i].init(picture, box)
            else:
                _, box = trackers[i].update(picture)
            if index in each.frames:
                points = (np.array(box[:2]) + grid * box[2:]) / frame.shape[1::-1]
                samples[i].append(np.where(((points >= 0) & (points <= 1)).all(-1, keepdims=True), points, ABSENT))
        if index == max(wanted):
            break
    return {(i, 0): np.stack(found, 1).astype(np.float32) for i, found in samples.items()}


def _box(mask: np.ndarray | None) -> tuple[int, int, int, int]:
    """Left, top, width and height of a mask."""
    assert mask is not None
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), len(columns), len(rows)


def _refound(clip: Path, moments: Sequence[Moments], masks: Masks) -> Tracks:
    """What the pipeline does with --people --refind: lost walkers are looked for by OpenCV's people detector."""
    phrases = [[Phrase("a person", 0) for _ in event] for event in masks]
    return refind(clip, moments, masks, phrases, track_all(clip, moments, masks), PeopleDetector())


METHODS: dict[str, Method] = {
    "annotation": track_all,
    "re-finding": _refound,
    "Lucas-Kanade": track_events,
    "CSRT": _csrt,
}
"""What the pipeline does, without and with --refind, and what it is compared with."""

OF_PEOPLE = ("re-finding", "CSRT")
"""Methods that are not measured on the synthetic world."""
