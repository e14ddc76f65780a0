"""The things of a video: detections of some frames, joined to objects with one identity over time.

Detections of a frame continue the objects of the frames before where their boxes overlap most with the expected ones,
and begin new objects where they do not. Between two detections of an object its box is interpolated, so every frame has
a box. Nothing outlives a call: two videos share no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dataloaders.annotation.boxes import box_ious

SAME, _CONTINUES = 0.5, 0.1
"""IoU above which two detections of a frame are one thing, and above which a detection continues an object."""
_GAP = 4
"""Most frames of detection without one, inside an object."""
_FEWEST = 3
"""Detections of an object; fewer are chance, in a video with more frames than that."""


@dataclass(frozen=True, eq=False)
class Detection:
    """A thing in a frame: its tag, box (4,) in pixels, score, and mask in run lengths (`encode_mask`), which are small."""

    tag: str
    box: np.ndarray
    score: float
    mask: dict[str, list[int]] | None = None


class Detector(Protocol):
    """Finds things by their tags.

    `tags` gives the names that it can look for, to ground these phrases; a call the detections of all tags in an image
    (H, W, 3) uint8 RGB.
    """

    def tags(self, phrases: Sequence[str]) -> list[str]: ...

    def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]: ...


@dataclass(eq=False)
class Object:
    """One thing over time: its detections by frame, in order.

    hidden  frames in which neither a tracker nor the detector sees it; None: no tracker carried it
    """

    tag: str
    found: dict[int, Detection] = field(default_factory=dict)
    hidden: tuple[int, ...] | None = None

    @property
    def score(self) -> float:
        """Sum of the scores: a thing that is seen for long counts more."""
        return sum(each.score for each in self.found.values())

    @property
    def first(self) -> int:
        return next(iter(self.found))

    @property
    def last(self) -> int:
        return next(reversed(self.found))

    def expected(self, frame: int) -> np.ndarray:
        """The box in a later frame, if it moves on as it did."""
        *before, last = list(self.found)[-2:]
        box = self.found[last].box
        if not before:
            return box
        moved = (box - self.found[before[0]].box) / (last - before[0])
        return box + np.tile((moved[:2] + moved[2:]) / 2, 2) * (frame - last)

    def boxes(self) -> dict[int, np.ndarray]:
        """A box (4,) of every frame from the first detection to the last, but for those between which it is hidden."""
        frames = np.array(list(self.found))
        known = np.stack([each.box for each in self.found.values()])
        every = np.arange(frames[0], frames[-1] + 1)
        between = np.stack([np.interp(every, frames, side) for side in known.T], -1)
        gaps = np.searchsorted(frames, self.hidden or ())
        shown = np.isin(every, frames) | ~np.isin(np.searchsorted(frames, every), gaps)
        return dict(zip(every[shown].tolist(), between[shown]))


def join(detections: Iterable[tuple[int, Sequence[Detection]]]) -> list[Object]:
    """The objects of the detections of some frames, given in order; the surest of each tag first."""
    objects: list[Object] = []
    frames: list[int] = []
    for frame, found in detections:
        frames.append(frame)
        open_since = frames[max(0, len(frames) - 2 - _GAP)]
        active = [each for each in objects if each.last >= open_since]
        rest = _distinct(found)
        pairs = [
            (float(box_ious(each.expected(frame)[None], new.box)[0]), i, j)
            for i, each in enumerate(active)
            for j, new in enumerate(rest)
            if new.tag == each.tag
        ]
        taken: set[int] = set()
        for iou, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:])):
            if iou >= _CONTINUES and j not in taken and frame not in active[i].found:
                active[i].found[frame] = rest[j]
                taken.add(j)
        objects += [Object(new.tag, {frame: new}) for j, new in enumerate(rest) if j not in taken]
    least = min(_FEWEST, len(frames))
    return sorted((each for each in objects if len(each.found) >= least), key=lambda each: (each.tag, -each.score))


def _distinct(found: Sequence[Detection]) -> list[Detection]:
    """Without the less sure of two detections of one thing (non-maximum suppression)."""
    kept: list[Detection] = []
    for new in sorted(found, key=lambda each: -each.score):
        if all(each.tag != new.tag or box_ious(each.box[None], new.box)[0] < SAME for each in kept):
            kept.append(new)
    return kept


def same_things(objects: Sequence[Object]) -> dict[int, set[int]]:
    """For each object, those of other tags whose boxes overlap with its own in most frames: a detector may find one thing
    as "man" and as "old man"."""
    found: dict[int, set[int]] = {}
    for i, one in enumerate(objects):
        for j, other in enumerate(objects[:i]):
            if one.tag != other.tag and _overlap(one, other):
                found.setdefault(i, set()).add(j)
                found.setdefault(j, set()).add(i)
    return found


def _overlap(one: Object, other: Object) -> bool:
    frames = one.found.keys() & other.found.keys()
    if 2 * len(frames) < min(len(one.found), len(other.found)):
        return False
    boxes, others = (np.stack([each.found[frame].box for frame in frames]) for each in (one, other))
    return float(box_ious(boxes, others).mean()) >= SAME
