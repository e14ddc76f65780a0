"""Find an object again that was lost: on later frames the detector looks for its phrase, and its colours decide.

Tracking bridges short gaps along the object's way. An object that comes back elsewhere, or that the tracker lost, is not
on that way. So after the last moment in which an object is present, the detector is used on a few later frames. What it
finds is the object if it has the object's colours, if nothing else that it finds has them nearly as much, and if no
other phrase's object is there. From that frame on the object is followed as from a first mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.annotation.appearance import SCALES, Appearance
from dataloaders.annotation.background import find_background
from dataloaders.annotation.boxes import filled
from dataloaders.annotation.models import Detector, Found
from dataloaders.annotation.objects import mask_in, track_all
from dataloaders.annotation.steps import Key, Masks, Phrases, Tracks
from dataloaders.annotation.tracking import Moments, frames_until, opencv
from dataloaders.records import ABSENT

_MIDDLE = (0.3, 0.2)
"""How far the place of the object's colours may be from the middle of what was detected, in its width and height."""


@dataclass(frozen=True)
class Refinding:
    """How objects are found again.

    looks  most frames of an event on which the detector is used
    gap    moments at the end of an event without an object, from which it is looked for
    alike  likeness of the colours, 1 for those of the first frame, from which a thing may be the object
    margin by how much the others that were found have to be less alike
    """

    looks: int = 6
    gap: int = 3
    alike: float = 0.75
    margin: float = 0.2


def refind(
    path: Path,
    moments: Sequence[Moments],
    masks: Masks,
    phrases: Phrases,
    tracks: Tracks,
    detector: Detector,
    settings: Refinding = Refinding(),
) -> Tracks:
    """Tracks of `track_all` with the later parts of lost objects. Raises as `track_events`."""
    lost = [
        _Lost(key, moments[key[0]], each, start, settings)
        for key, each in tracks.items()
        if 0 < (start := _end(each)) <= each.shape[1] - settings.gap
    ]
    wanted = {frame for each in lost for frame in (each.moments.first, *each.looks)}
    if not wanted:
        return tracks
    background = find_background(path, min(wanted), max(wanted))
    for index, frame in frames_until(path, wanted):
        for each in lost:
            if index == each.moments.first:
                mask = masks[each.key[0]][each.key[1]]
                assert mask is not None, "a track comes from a mask"
                if (here := mask_in(frame, mask)) is not None:
                    each.appearance = Appearance(opencv(), frame, here, background)
        looking = [each for each in lost if each.appearance is not None and each.again is None and index in each.looks]
        names = list(dict.fromkeys(phrases[each.key[0]][each.key[1]].text for each in looking))
        found = dict(zip(names, detector.find_all(frame, names))) if names else {}
        for each in looking:
            places = (_place(track, moments[key[0]], index) for key, track in tracks.items() if key != each.key)
            things = found[phrases[each.key[0]][each.key[1]].text]
            each.look(index, frame, things, [place for place in places if place is not None])
    again = [each for each in lost if each.again is not None]
    later = track_all(path, [each.rest for each in again], [[each.again] for each in again])
    joined = {
        each.key: _joined(each, tracks[each.key], later[i, 0])
        for i, each in enumerate(again)
        if (i, 0) in later and (later[i, 0][:, 0] != ABSENT).any()
    }
    return tracks | joined


class _Lost:
    """An object that is absent from moment `start` on; `again` is its mask (H, W) at moment `at`, once it is found."""

    def __init__(self, key: Key, moments: Moments, track: np.ndarray, start: int, settings: Refinding) -> None:
        self.key, self.moments, self._settings = key, moments, settings
        last = len(moments.frames) - 1
        chosen = np.linspace(start, last, settings.looks + 1)[:-1].round().astype(int)
        self.looks = {int(moments.frames[k]): int(k) for k in chosen[::-1]}
        self.appearance: Appearance | None = None
        self.again: np.ndarray | None = None
        self.at = start

    @property
    def rest(self) -> Moments:
        return Moments(self.moments.frames[self.at :])

    def look(self, index: int, frame: np.ndarray, found: Sequence[Found], others: Sequence[np.ndarray]) -> None:
        """Decide whether one of the things found in a frame is the object. `others` are places (2,) of other objects."""
        assert self.appearance is not None
        boxes = np.array([box for box, _, _ in found]).reshape(-1, 4)
        alike = self._likeness(frame, boxes)
        for place in others:
            at = place * frame.shape[1::-1]
            alike[((boxes[:, :2] <= at) & (at <= boxes[:, 2:])).all(1)] = 0
        if not len(alike) or alike.max() < self._settings.alike:
            return
        best = int(alike.argmax())
        elsewhere = _apart(boxes, boxes[best])
        if elsewhere.any() and alike[elsewhere].max() > alike[best] - self._settings.margin:
            return
        mask = found[best][2]
        self.again, self.at = filled(boxes[best], frame.shape) if mask is None else mask, self.looks[index]

    def _likeness(self, frame: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """How much each box (n, 4) has the object's colours: the best score of a place in its middle and of its size."""
        assert self.appearance is not None
        places = self.appearance.find(frame)
        heights = self.appearance.size[1] * np.array(SCALES)[places.sizes]
        alike = np.zeros(len(boxes))
        for i, box in enumerate(boxes * self.appearance.shrink):
            size = box[2:] - box[:2]
            off = np.abs(places.centres - (box[:2] + box[2:]) / 2) / np.maximum(size, 1)
            fits = (off <= _MIDDLE).all(1) & (np.abs(np.log(heights / max(size[1], 1))) < np.log(1.5))
            alike[i] = places.scores[fits].max(initial=0)
        return alike


def _end(track: np.ndarray) -> int:
    """The moment after the last in which a point of a track (M, K, 2) is present."""
    here = np.flatnonzero((track != ABSENT).all(-1).any(0))
    return int(here[-1]) + 1 if len(here) else 0


def _place(track: np.ndarray, moments: Moments, frame: int) -> np.ndarray | None:
    """The median (2,) of the points of a track in a frame, as fractions; None where it is absent or has no moment."""
    at = np.flatnonzero(moments.frames == frame)
    points = track[:, at[0]] if len(at) else track[:, :0].reshape(-1, 2)
    points = points[(points != ABSENT).all(-1)]
    return np.asarray(np.median(points, 0)) if len(points) else None


def _joined(lost: _Lost, before: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Each point goes on as the later point at the nearest place in its object."""
    first, again = (_relative(points) for points in (before[:, _start(before)], later[:, 0]))
    nearest = ((first[:, None] - again[None]) ** 2).sum(-1).argmin(1)
    joined = before.copy()
    joined[:, lost.at :] = later[nearest]
    return joined


def _relative(points: np.ndarray) -> np.ndarray:
    """Places (M, 2) in the box of points (M, 2), of which some may be absent: these are in its middle."""
    here = (points != ABSENT).all(-1)
    low, high = points[here].min(0), points[here].max(0)
    return np.where(here[:, None], (points - low) / np.maximum(high - low, 1e-6), 0.5)


def _start(track: np.ndarray) -> int:
    return int(np.flatnonzero((track != ABSENT).all(-1).any(0))[0])


def _apart(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Which boxes are other things than one of them: their centre is outside of it."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.asarray(((centres < box[:2]) | (centres > box[2:])).any(1))
