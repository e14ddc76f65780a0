"""Tracks of things that change their shape, such as people who walk: the object as a whole, with points held inside it.

Lucas-Kanade follows a rigid thing to a fraction of a pixel, and loses a walker within a second, because no small piece
of one looks the same a stride later. So an object that it loses is followed once more, by its colours and its motion.
Its points keep their places in it. They are as exact as its centre, some pixels, not as a piece of texture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.annotation.appearance import SCALES, Appearance, Candidates
from dataloaders.annotation.background import Background, find_background
from dataloaders.annotation.linking import link
from dataloaders.annotation.steps import Key, Masks, Tracks
from dataloaders.annotation.tracking import Moments, frames_until, opencv, track_events
from dataloaders.records import ABSENT

_REACH = 4
"""Pixels by which a place may be off."""

_ENOUGH = 0.2
"""Share of an object's points that suffices for its key points."""

_SMALLEST = 6
"""Pixels of the shorter side of an object that is followed."""


@dataclass(frozen=True)
class Following:
    """How objects are followed that Lucas-Kanade loses.

    lost     an object is followed as a whole if Lucas-Kanade's points are present in less than this share of moments
    rigid    correlation with the object's first picture above which a place is moved to where that is largest
    points   most points of an object
    substeps frames that are looked at from one moment to the next, at most
    bridged  a gap of this many frames is no absence
    """

    lost: float = 0.25
    rigid: float = 0.7
    points: int = 64
    substeps: int = 6
    bridged: int = 2


def track_all(
    path: Path,
    moments: Sequence[Moments],
    masks: Masks,
    following: Following = Following(),
) -> Tracks:
    """Track points in each mask: by Lucas-Kanade, and as a whole where that loses the object. Raises as `track_events`.

    An object's tracks are those of the method that has its points present in more moments.
    """
    tracks = track_events(path, moments, masks)
    lost = [key for key in _keys(masks) if _presence(tracks.get(key)) < following.lost]
    for key, found in follow_objects(path, moments, masks, lost, following).items():
        if _presence(found) > _presence(tracks.get(key)):
            tracks[key] = found
    return tracks


def follow_objects(
    path: Path,
    moments: Sequence[Moments],
    masks: Masks,
    keys: Iterable[Key],
    following: Following = Following(),
) -> Tracks:
    """Follow the objects of some phrases as wholes. Raises DecodeError for a file that cannot be decoded."""
    objects = [_Object(key, moments[key[0]], masks[key[0]][key[1]], following) for key in keys]
    wanted = {frame for each in objects for frame in each.frames}
    if not wanted:
        return {}
    background = find_background(path, min(wanted), max(wanted))
    for index, frame in frames_until(path, wanted):
        for each in objects:
            each.add_frame(index, frame, background)
    tracks = {each.key: each.tracks() for each in objects}
    return {key: track for key, track in tracks.items() if track is not None}


def mask_in(frame: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """A mask in the size of a frame (H, W, 3): (H, W) bool; None where its object is too small to be followed."""
    cv2 = opencv()
    resized = cv2.resize(mask.astype(np.uint8), frame.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
    large = resized.any() and min(np.ptp(axis) for axis in np.nonzero(resized)) >= _SMALLEST
    return np.asarray(resized) if large else None


class _Object:
    def __init__(self, key: Key, moments: Moments, mask: np.ndarray | None, following: Following) -> None:
        self.key, self._moments, self._mask, self._following = key, moments, mask, following
        self.frames = _looked_at(moments, following.substeps)
        self._set = set(self.frames)
        self._cv2: Any = opencv()
        self._appearance: Appearance | None = None
        self._candidates: list[Candidates] = []
        self._frame_size = np.ones(2)
        self._greys: dict[int, np.ndarray] = {}

    def add_frame(self, index: int, frame: np.ndarray, background: Background | None) -> None:
        if index not in self._set:
            return
        if index == self.frames[0]:
            assert self._mask is not None, "only objects with a mask are followed"
            mask = mask_in(frame, self._mask)
            if mask is None:
                self._set = set()
                return
            self._appearance = Appearance(self._cv2, frame, mask, background)
            self._candidates.append(self._appearance.first)
            self._frame_size = np.array(frame.shape[1::-1]) * self._appearance.shrink
        elif self._appearance is not None:
            self._candidates.append(self._appearance.find(frame))
        if self._appearance is not None and index in self._moments.frames:
            self._greys[index] = self._appearance.grey

    def tracks(self) -> np.ndarray | None:
        """Points (M, K, 2) as fractions of the frame; None for an object that is too small."""
        if self._appearance is None:
            return None
        way = link(self._candidates, self._appearance.size, self._frame_size)
        centres, scales = _smooth(self._candidates, way, len(self.frames), self._following.bridged)
        at = np.searchsorted(self.frames, self._moments.frames)
        sizes = np.where(at == 0, 1, scales[at] / self._appearance.usual)
        places = centres[at]
        for k, (frame, place) in enumerate(zip(self._moments.frames, places)):
            exact = self._exact(self._greys[frame], place) if np.isfinite(place[0]) else None
            if exact is not None:
                places[k], sizes[k] = exact, 1
        offsets = self._points() - self._appearance.centre
        positions = places + offsets[:, None] * sizes[:, None]
        fractions = positions / self._frame_size
        present = np.isfinite(fractions).all(-1) & (fractions >= 0).all(-1) & (fractions <= 1).all(-1)
        return np.where(present[..., None], fractions, ABSENT).astype(np.float32)

    def _exact(self, grey: np.ndarray, centre: np.ndarray) -> np.ndarray | None:
        """The place near a centre that looks as the object did at first; None if none does, as of someone who walks."""
        assert self._appearance is not None
        template = _patch(self._cv2, self._greys[self._moments.first], self._appearance.centre, self._appearance.size)
        around = _patch(self._cv2, grey, centre, np.array(template.shape[::-1]) + 2 * _REACH)
        likeness = self._cv2.matchTemplate(around, template, self._cv2.TM_CCOEFF_NORMED)
        best = np.unravel_index(likeness.argmax(), likeness.shape)
        if likeness[best] < self._following.rigid:
            return None
        y, x = (best[axis] - _REACH + _vertex(likeness, best, axis) for axis in (0, 1))
        return np.asarray(centre + np.array((x, y)))

    def _points(self) -> np.ndarray:
        """Points (M, 2) in pixels of the shrunk frame: on a grid in the middle columns of the object's pixels."""
        assert self._appearance is not None
        y, x = np.nonzero(self._appearance.pixels)
        across = (x + 0.5 - self._appearance.centre[0]) / self._appearance.size[0]
        low, high = self._appearance.inner
        y, x = y[(across >= low) & (across <= high)], x[(across >= low) & (across <= high)]
        step = max(1, int(np.ceil((len(x) / self._following.points) ** 0.5)))
        chosen = (y % step == step // 2) & (x % step == step // 2)
        chosen = chosen if chosen.sum() >= min(8, len(x)) else np.arange(len(x)) % max(1, len(x) // 8) == 0
        return np.stack((x[chosen], y[chosen]), -1)[: self._following.points] + 0.5


def _patch(cv2: Any, grey: np.ndarray, centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The pixels of a box, also outside the frame, where its edge is repeated."""
    return np.asarray(cv2.getRectSubPix(grey, tuple(int(length) for length in size), tuple(map(float, centre))))


def _vertex(values: np.ndarray, best: Sequence[Any], axis: int) -> float:
    """Offset of the vertex of the parabola through the maximum of values (h, w) and its neighbours on an axis."""
    at = int(best[axis])
    if not 0 < at < values.shape[axis] - 1:
        return 0.0
    low, high = (values.take(at + d, axis)[best[1 - axis]] for d in (-1, 1))
    bend = 2 * values[tuple(best)] - low - high
    return float((high - low) / (2 * bend)) if bend > 0 else 0.0


def _looked_at(moments: Moments, substeps: int) -> list[int]:
    """Frames from the first moment to the last, each moment's frame and at most `substeps` from one to the next."""
    ends = zip(moments.frames[:-1], moments.frames[1:])
    steps = [np.linspace(a, b, min(substeps, b - a) + 1) for a, b in ends if b > a]
    return np.unique(np.rint(np.concatenate([[moments.first], *steps])).astype(int)).tolist()


def _smooth(
    candidates: Sequence[Candidates], way: dict[int, int], count: int, bridged: int
) -> tuple[np.ndarray, np.ndarray]:
    """Centres (count, 2) and sizes (count,) on the way, averaged over neighbouring frames; NaN where hidden."""
    seen = np.array(sorted(way))
    centres = np.stack([candidates[t].centres[way[t]] for t in seen])
    sizes = np.log([SCALES[candidates[t].sizes[way[t]]] for t in seen])
    times = np.arange(count)
    between = np.stack([np.interp(times, seen, axis) for axis in (*centres.T, sizes)], -1)
    smooth = np.stack([_moving(between[:, 0], 1), _moving(between[:, 1], 1), _moving(between[:, 2], 7)], -1)
    smooth[0] = between[0]
    after = np.searchsorted(seen, times)
    hidden = after == len(seen)
    inside = ~hidden
    gap = seen[after[inside]] - seen[np.maximum(after[inside] - 1, 0)]
    hidden[inside] = (seen[after[inside]] != times[inside]) & (gap > bridged + 1)
    smooth[hidden] = np.nan
    return smooth[:, :2], np.exp(smooth[:, 2])


def _moving(values: np.ndarray, reach: int) -> np.ndarray:
    """Moving average over at most `reach` neighbours on either side, fewer at the ends."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    reach_here = np.minimum(reach, np.minimum(at, len(values) - 1 - at))
    return np.asarray((sums[at + reach_here + 1] - sums[at - reach_here]) / (2 * reach_here + 1))


def _keys(masks: Masks) -> list[Key]:
    return [(i, j) for i, event in enumerate(masks) for j, mask in enumerate(event) if mask is not None and mask.any()]


def _presence(tracks: np.ndarray | None) -> float:
    """Share of the moments in which enough points of an object are present for its key points, which come from these."""
    if tracks is None or not len(tracks):
        return 0.0
    return float(((tracks != ABSENT).all(-1).mean(0) >= _ENOUGH).mean())
