"""Points of an object followed through its event: pyramidal Lucas-Kanade, forward and back, on every source frame.

It needs no weights and follows texture: of a plain surface, points near its corners and of a plain disc its rim. What it
loses stays lost, so an object that comes back from behind another is absent from then on. Trackers that see longer (DOT,
as PiTe used, or CoTracker) are code bases of their own; their tracks come in by their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.annotation.steps import Masks, Tracks
from dataloaders.decode.video import DecodeError, iter_frames, probe
from dataloaders.formats.activitynet import Event
from dataloaders.records import ABSENT, RecordError


def opencv() -> Any:
    """The module, on one thread: processes share the work. Raises ValueError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise ValueError("to follow points takes OpenCV: pip install opencv-python-headless") from None
    cv2.setNumThreads(1)
    return cv2


@dataclass(frozen=True)
class LucasKanade:
    """How points are chosen and followed; lengths in pixels of the frame as it is tracked.

    side      the shorter side of the frame is shrunk to this, if it is longer
    points    followed for an object, at most
    window    side of the square around a point that has to look the same
    quality   least eigenvalue of the window's gradients, as a share of the object's largest (Shi and Tomasi)
    levels    halvings of the frame that large motion is first looked for in
    backward  how far from where it was a point may come back to when followed back
    residual  mean difference of the two windows, in grey levels of 255, above which they do not show the same
    """

    side: int = 360
    points: int = 64
    window: int = 15
    quality: float = 0.05
    levels: int = 3
    backward: float = 0.5
    residual: float = 8.0


@dataclass(frozen=True)
class Moments:
    """When an event's points are looked at: K moments evenly spaced over it, both ends included.

    frames  (K,) int64, the source frame that is shown at each, ascending; by the records' clock, on which source frame f of
            T stands at f / (T - 1) of the duration
    """

    frames: np.ndarray

    @staticmethod
    def of(event: Event, duration: float, total: int, num_frames: int) -> Moments:
        """As many that they stand no further apart than the N frames that a model sees of the video."""
        count = int(np.ceil((event.end - event.start) / duration * (num_frames - 1) - 1e-6)) + 1
        times = np.linspace(event.start, event.end, count)
        return Moments(np.rint(times / duration * (total - 1)).astype(np.int64).clip(0, total - 1))

    @property
    def first(self) -> int:
        return int(self.frames[0])

    @property
    def last(self) -> int:
        return int(self.frames[-1])


def count_frames(path: Path) -> int:
    """Frames of a video, from its packets where those can be trusted. Raises DecodeError."""
    found = probe(path)
    total = found.total if found.regular else sum(1 for _ in iter_frames(path, ()))
    if not total:
        raise DecodeError(f"{path}: holds no frame")
    return total


def first_frames(path: Path, moments: Sequence[Moments]) -> dict[int, np.ndarray]:
    """The first frame (H, W, 3) of each event, by its index. Decodes no further than the last of them."""
    wanted = {each.first for each in moments}
    frames: dict[int, np.ndarray] = {}
    if not wanted:
        return frames
    for index, frame in enumerate(iter_frames(path, wanted)):
        if frame is not None:
            frames[index] = frame
            if len(frames) == len(wanted):
                return frames
    raise DecodeError(f"{path}: ends before frame {max(wanted)}, which its packets announce")


def track_events(path: Path, moments: Sequence[Moments], masks: Masks, settings: LucasKanade = LucasKanade()) -> Tracks:
    """Follow points in each mask from its event's first frame to its last.

    Raises DecodeError for what cannot be decoded, RecordError where a mask has another aspect than the video, and ValueError
    where OpenCV is not installed.
    """
    follower = _Follower(settings, moments, masks, path)
    wanted = follower.wanted
    if not wanted:
        return {}
    last = max(wanted)
    for index, frame in enumerate(iter_frames(path, wanted)):
        if frame is not None:
            follower.see(index, frame)
        if index == last:
            return follower.tracks()
    raise DecodeError(f"{path}: ends before frame {last}, which its packets announce")


@dataclass(eq=False)
class _Object:
    """Points of one phrase's object. position (M, 2) in pixels; alive (M,); samples: (M, 2) at each moment, in fractions."""

    key: tuple[int, int]
    moments: Moments
    position: np.ndarray
    alive: np.ndarray
    samples: list[np.ndarray]

    def sample(self, index: int, size: np.ndarray) -> None:
        """Note the positions once for each moment that shows frame `index`."""
        # The middle of the first pixel is half a pixel from the edge.
        here = np.where(self.alive[:, None], (self.position + 0.5) / size, ABSENT)
        self.samples += [here] * int((self.moments.frames == index).sum())


class _Follower:
    def __init__(self, settings: LucasKanade, moments: Sequence[Moments], masks: Masks, path: Path) -> None:
        self._cv2 = opencv()
        self._settings, self._path = settings, path
        self._waiting = [
            (i, j, moments[i], mask)
            for i, event in enumerate(masks)
            for j, mask in enumerate(event)
            if mask is not None and mask.any()
        ]
        self._followed: list[_Object] = []
        self._before: np.ndarray | None = None

    @property
    def wanted(self) -> set[int]:
        """Frames that show an event with something to follow."""
        return {f for _, _, moments, _ in self._waiting for f in range(moments.first, moments.last + 1)}

    def see(self, index: int, frame: np.ndarray) -> None:
        grey = self._shrunk(self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2GRAY))
        size = np.array(grey.shape[::-1], np.float64)
        active = [thing for thing in self._followed if thing.moments.first < index <= thing.moments.last]
        if active and self._before is not None:
            self._advance(self._before, grey, active, size)
        for i, j, moments, mask in self._waiting:
            if moments.first == index:
                position = self._choose(grey, mask)
                self._followed.append(_Object((i, j), moments, position, np.ones(len(position), bool), []))
                active.append(self._followed[-1])
        for thing in active:
            thing.sample(index, size)
        self._before = grey

    def tracks(self) -> Tracks:
        return {
            thing.key: np.stack(thing.samples, 1).astype(np.float32) for thing in self._followed if len(thing.alive)
        }

    def _shrunk(self, grey: np.ndarray) -> np.ndarray:
        scale = self._settings.side / min(grey.shape)
        if scale >= 1:
            return grey
        size = tuple(round(length * scale) for length in grey.shape[::-1])
        return np.asarray(self._cv2.resize(grey, size, interpolation=self._cv2.INTER_AREA))

    def _choose(self, grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Points (M, 2) in pixels on a grid in the mask, where a window can be told from its neighbours in both directions."""
        (height, width), settings = grey.shape, self._settings
        if abs(mask.shape[1] / mask.shape[0] * height / width - 1) > 0.02:
            raise RecordError(
                f"{self._path}: frames of {width} x {height}, but a mask of {mask.shape[1]} x {mask.shape[0]}"
            )
        inside = self._cv2.resize(mask.astype(np.uint8), (width, height), interpolation=self._cv2.INTER_NEAREST) > 0
        strength = np.where(inside, self._cv2.cornerMinEigenVal(grey, settings.window, ksize=3), 0)
        good = strength >= settings.quality * strength.max()
        good &= strength > 0
        # The step that gives as many points as can be had of `points`, and no more.
        for step in range(max(1, int((good.sum() / settings.points) ** 0.5)), max(height, width) + 1):
            y, x = np.nonzero(good[step // 2 :: step, step // 2 :: step])
            if len(x) <= settings.points:
                break
        return np.stack((x, y), -1).astype(np.float32) * step + step // 2

    def _advance(self, before: np.ndarray, grey: np.ndarray, active: Sequence[_Object], size: np.ndarray) -> None:
        """Move the points that are not lost to the next frame; one call for all objects, since each builds pyramids."""
        living = [thing for thing in active if thing.alive.any()]
        if not living:
            return
        settings = self._settings
        start = np.concatenate([thing.position[thing.alive] for thing in living])[:, None]
        forward, found, residual = self._flow(before, grey, start)
        back, returned, _ = self._flow(grey, before, forward)
        kept = (found[:, 0] > 0) & (returned[:, 0] > 0) & (residual[:, 0] < settings.residual)
        kept &= np.abs(back - start).max((1, 2)) < settings.backward
        kept &= ((forward[:, 0] + 0.5 >= 0) & (forward[:, 0] + 0.5 <= size)).all(-1)
        ends = np.cumsum([thing.alive.sum() for thing in living])[:-1]
        for thing, moved, still in zip(living, np.split(forward[:, 0], ends), np.split(kept, ends)):
            thing.position[thing.alive] = moved
            thing.alive[thing.alive] = still

    def _flow(self, one: np.ndarray, other: np.ndarray, points: np.ndarray) -> Any:
        window = (self._settings.window, self._settings.window)
        return self._cv2.calcOpticalFlowPyrLK(one, other, points, None, winSize=window, maxLevel=self._settings.levels)
