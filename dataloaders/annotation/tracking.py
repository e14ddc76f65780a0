"""Track points of an object through its event: pyramidal Lucas-Kanade, forward and backward, on every source frame.

It needs no weights, and it tracks texture: on a plain surface points near its corners, on a plain disc its rim. A lost
point stays lost, so an object that reappears from behind another stays absent. Trackers with a longer memory (DOT,
which PiTe used, or CoTracker) are separate code bases. To use their tracks, write the files of this step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.annotation.steps import Masks, Tracks
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.video import iter_frames, probe
from dataloaders.formats.activitynet import Event
from dataloaders.records import ABSENT, RecordError


def opencv() -> Any:
    """Import OpenCV, limited to one thread, since many processes run. Raises ValueError if it is not installed."""
    try:
        import cv2
    except ImportError:
        raise ValueError("tracking needs OpenCV: pip install opencv-contrib-python-headless") from None
    cv2.setNumThreads(1)
    return cv2


Check = Callable[[], None]
"""Called before each frame that is looked at; what it raises ends the work."""


@dataclass(frozen=True)
class LucasKanade:
    """How points are chosen and tracked. Lengths are in pixels of the frame after it was shrunk.

    side      the shorter side of a larger frame is shrunk to this
    points    most points per object
    window    side of the square around a point that is compared
    quality   minimum eigenvalue of the window's gradients, as a share of the object's largest (Shi and Tomasi)
    levels    pyramid levels, each half the size, for large motion
    backward  forward-backward error: largest distance from the origin after tracking a point back
    residual  largest mean difference of the two windows, in grey levels of 255
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
    """The K moments at which an event's points are sampled, evenly spaced over it, both ends included.

    frames  (K,) int64, the source frame shown at each, ascending. By the clock of the records, source frame f of T is
            at f / (T - 1) of the duration
    """

    frames: np.ndarray

    @staticmethod
    def of(event: Event, duration: float, total: int, num_frames: int) -> Moments:
        """Enough moments that they are no further apart than the N frames of the video that a model sees."""
        count = int(np.ceil((event.end - event.start) / duration * (num_frames - 1) - 1e-6)) + 1
        times = np.linspace(event.start, event.end, count)
        return Moments(np.rint(times / duration * (total - 1)).astype(np.int64).clip(0, total - 1))

    def after(self, frames: int) -> Moments:
        """The same moments in a file that has this many frames before the clip."""
        return Moments(self.frames + frames)

    @property
    def first(self) -> int:
        return int(self.frames[0])

    @property
    def last(self) -> int:
        return int(self.frames[-1])


def count_frames(path: Path, clip: tuple[float, float] | None = None) -> tuple[int, int]:
    """The index of a clip's first frame in its file, and the clip's number of frames; of the whole file without a clip.

    From the packets where those are reliable, else by decoding. Raises DecodeError.
    """
    found = probe(path, clip)
    if found.regular or (clip is not None and found.total):
        return found.first, found.total
    if clip is not None:
        raise DecodeError(f"{path}: its frames carry no times, so no clip can be cut from it")
    total = sum(1 for _ in iter_frames(path, ()))
    if not total:
        raise DecodeError(f"{path}: holds no frame")
    return 0, total


def go_on() -> None:
    """The check of work that nothing ends."""


def frames_until(path: Path, wanted: Collection[int], check: Check = go_on) -> Iterator[tuple[int, np.ndarray]]:
    """The frames `wanted`, with their indices.

    Raises DecodeError for a file that ends before the last of them, and what `check` raises.
    """
    last = max(wanted, default=-1)
    for index, frame in enumerate(iter_frames(path, wanted) if wanted else ()):
        if frame is not None:
            check()
            yield index, frame
        if index == last:
            return
    if wanted:
        raise DecodeError(f"{path}: ends before frame {last}, which its packets promise")


def first_frames(path: Path, moments: Sequence[Moments]) -> dict[int, np.ndarray]:
    """The first frame (H, W, 3) of each event, by its index. Stops decoding after the last of them."""
    return dict(frames_until(path, {each.first for each in moments}))


def track_events(path: Path, moments: Sequence[Moments], masks: Masks, settings: LucasKanade = LucasKanade()) -> Tracks:
    """Track points in each mask from its event's first frame to its last.

    Raises DecodeError for a file that cannot be decoded, RecordError where a mask has another aspect ratio than the
    video, and ValueError if OpenCV is not installed.
    """
    tracker = _Tracker(settings, moments, masks, path)
    for index, frame in frames_until(path, tracker.wanted):
        tracker.add_frame(index, frame)
    return tracker.tracks()


@dataclass(eq=False)
class _Object:
    """Points of a phrase's object: position (M, 2) in pixels; alive (M,); samples, (M, 2) fractions at each moment."""

    key: tuple[int, int]
    moments: Moments
    position: np.ndarray
    alive: np.ndarray
    samples: list[np.ndarray]

    def sample(self, index: int, size: np.ndarray) -> None:
        """Store the positions once for each moment that shows frame `index`."""
        # The centre of the first pixel is half a pixel from the edge.
        here = np.where(self.alive[:, None], (self.position + 0.5) / size, ABSENT)
        self.samples += [here] * int((self.moments.frames == index).sum())


class _Tracker:
    def __init__(self, settings: LucasKanade, moments: Sequence[Moments], masks: Masks, path: Path) -> None:
        self._cv2 = opencv()
        self._settings, self._path = settings, path
        self._waiting = [
            (i, j, moments[i], mask)
            for i, event in enumerate(masks)
            for j, mask in enumerate(event)
            if mask is not None and mask.any()
        ]
        self._objects: list[_Object] = []
        self._before: np.ndarray | None = None

    @property
    def wanted(self) -> set[int]:
        """Frames that show an event with an object to track."""
        return {f for _, _, moments, _ in self._waiting for f in range(moments.first, moments.last + 1)}

    def add_frame(self, index: int, frame: np.ndarray) -> None:
        """Track all active objects from the last frame to this one."""
        grey = self._shrunk(self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2GRAY))
        size = np.array(grey.shape[::-1], np.float64)
        active = [obj for obj in self._objects if obj.moments.first < index <= obj.moments.last]
        if active and self._before is not None:
            self._advance(self._before, grey, active, size)
        for i, j, moments, mask in self._waiting:
            if moments.first == index:
                position = self._choose(grey, mask)
                self._objects.append(_Object((i, j), moments, position, np.ones(len(position), bool), []))
                active.append(self._objects[-1])
        for obj in active:
            obj.sample(index, size)
        self._before = grey

    def tracks(self) -> Tracks:
        return {obj.key: np.stack(obj.samples, 1).astype(np.float32) for obj in self._objects if len(obj.alive)}

    def _shrunk(self, grey: np.ndarray) -> np.ndarray:
        scale = self._settings.side / min(grey.shape)
        if scale >= 1:
            return grey
        size = tuple(round(length * scale) for length in grey.shape[::-1])
        return np.asarray(self._cv2.resize(grey, size, interpolation=self._cv2.INTER_AREA))

    def _choose(self, grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Points (M, 2) in pixels on a grid in the mask, at windows with enough gradient in both directions."""
        (height, width), settings = grey.shape, self._settings
        if abs(mask.shape[1] / mask.shape[0] * height / width - 1) > 0.02:
            raise RecordError(
                f"{self._path}: frames of {width} x {height}, but a mask of {mask.shape[1]} x {mask.shape[0]}"
            )
        inside = self._cv2.resize(mask.astype(np.uint8), (width, height), interpolation=self._cv2.INTER_NEAREST) > 0
        strength = np.where(inside, self._cv2.cornerMinEigenVal(grey, settings.window, ksize=3), 0)
        good = strength >= settings.quality * strength.max()
        good &= strength > 0
        # The smallest step that gives at most `points` points.
        for step in range(max(1, int((good.sum() / settings.points) ** 0.5)), max(height, width) + 1):
            y, x = np.nonzero(good[step // 2 :: step, step // 2 :: step])
            if len(x) <= settings.points:
                break
        return np.stack((x, y), -1).astype(np.float32) * step + step // 2

    def _advance(self, before: np.ndarray, grey: np.ndarray, active: Sequence[_Object], size: np.ndarray) -> None:
        """Move the points that are not lost to the next frame. One call for all objects, since it builds pyramids."""
        active = [obj for obj in active if obj.alive.any()]
        if not active:
            return
        settings = self._settings
        start = np.concatenate([obj.position[obj.alive] for obj in active])[:, None]
        forward, found, residual = self._flow(before, grey, start)
        back, returned, _ = self._flow(grey, before, forward)
        kept = (found[:, 0] > 0) & (returned[:, 0] > 0) & (residual[:, 0] < settings.residual)
        kept &= np.abs(back - start).max((1, 2)) < settings.backward
        kept &= ((forward[:, 0] + 0.5 >= 0) & (forward[:, 0] + 0.5 <= size)).all(-1)
        ends = np.cumsum([obj.alive.sum() for obj in active])[:-1]
        for obj, moved, still in zip(active, np.split(forward[:, 0], ends), np.split(kept, ends)):
            obj.position[obj.alive] = moved
            obj.alive[obj.alive] = still

    def _flow(self, one: np.ndarray, other: np.ndarray, points: np.ndarray) -> Any:
        window = (self._settings.window, self._settings.window)
        return self._cv2.calcOpticalFlowPyrLK(one, other, points, None, winSize=window, maxLevel=self._settings.levels)
