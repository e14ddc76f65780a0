"""Where in a frame an object may be: places whose colours, from top to bottom, are those that it had at first.

A colour that the object has more often than the rest of the frame counts for a place, and a rarer one against it. So a
dark coat over blue trousers is found among dark suits, but of two people in the same clothes both are found: which one
it is follows from the motion (`linking.py`). Colours outlast a turn of the body or a stride, which no template does.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dataloaders.annotation.background import Background, known_pixels, shows

BANDS = 3
"""Parts of an object from top to bottom, each with its own colours, such as head, coat and trousers."""

SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.12, 1.25, 1.4)
"""Sizes that are searched, relative to the first one."""

_SIDE = 64
"""Pixels of the longer side of the object, after its frames were shrunk."""
_SHAPE = (16, 8, 8)
"""Bins of L, a and b of CIELAB. Dark colours have finer ones, and so have greyish ones."""
_COLOURS = 16 * 8 * 8
_LIGHTNESS = np.minimum(15, (np.arange(256) / 255) ** 0.6 * 16).astype(np.int32)
_HUE = np.clip((np.arange(256) - 96) >> 3, 0, 7).astype(np.int32)
_RARE, _LIMIT = 2e-4, 2.5
"""Added to each frequency of a colour; largest absolute value of a logarithm of a ratio of two."""
_STRIDE = 2
_MOST = 60
"""Pixels between places that are searched; most candidates of a frame."""
_SURROUNDINGS = 0.5
"""How much the object's colours in a place's surroundings count against it: the place is part of something larger."""
_GROUND = np.float32(-1.0)
"""How much a pixel that shows the background counts, at most."""
_MOVING = np.float32(0.4)
"""How much a pixel counts more that does not show the background, where there is a known one."""
_LARGER = 0.6
"""Exponent of the size that a score is multiplied with. Without it, a part of the object scores more than the whole."""
_OWN = (0.3, 1.8)
"""Limits of the object's own score in its first frame, by which scores are divided: later frames fit less well."""
_LEAST = 0.35
"""Smallest score of a candidate."""
_RIVAL = 0.3
"""Share that the colours of the most similar other things in the first frame have in the background's."""


@dataclass(frozen=True)
class Candidates:
    """Places of a frame: centres (n, 2) in pixels of the shrunk frame; sizes (n,), indices of `SCALES`; scores (n,),
    1 where the object's own score in the first frame is reached; velocities (n, 2), pixels since the last frame."""

    centres: np.ndarray
    sizes: np.ndarray
    scores: np.ndarray
    velocities: np.ndarray


class Appearance:
    """Colours of an object, learned from its first frame and mask.

    frame  (H, W, 3) uint8 RGB
    mask   (H, W) bool, not empty. Where it fills its box, GrabCut separates object and background in it
    background  of the scene; None where the camera moves
    """

    def __init__(self, cv2: Any, frame: np.ndarray, mask: np.ndarray, background: Background | None = None) -> None:
        self._cv2 = cv2
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
        self.shrink = min(1.0, _SIDE / max(box[2:] - box[:2]))
        shrunk = self._shrunk(frame)
        box = box * self.shrink
        self.centre, self.size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        self._background, self._known = None, None
        if background is not None:
            picture, settled = (_resized(cv2, each, shrunk) for each in (background.picture, background.settled))
            self._background = picture
            self._known = known_pixels(shrunk, Background(picture, settled > 0), box)
        self.pixels = self._object_pixels(frame, mask, shrunk, box)
        across = (np.nonzero(self.pixels)[1] + 0.5 - self.centre[0]) / self.size[0]
        inner = np.quantile(across, (0.15, 0.85))
        self.inner, self._outer = inner, np.quantile(across, (0.02, 0.98)) + np.array([-0.03, 0.03])
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self.grey = np.asarray(cv2.cvtColor(shrunk, cv2.COLOR_RGB2GRAY))
        self._learn(_bins(cv2, shrunk), self._ground(shrunk), box)

    @property
    def first(self) -> Candidates:
        """The object in its first frame."""
        size = np.array([SCALES.index(1.0)])
        return Candidates(self.centre[None], size, np.ones(1), np.zeros((1, 2)))

    def find(self, frame: np.ndarray) -> Candidates:
        """Places in the next frame that may be the object, best first."""
        shrunk = self._shrunk(frame)
        grey = self._cv2.cvtColor(shrunk, self._cv2.COLOR_RGB2GRAY)
        flow = self._flow.calc(grey, self.grey, None)
        self.grey = grey
        centres, sizes, scores = self._peaks(self._scores(_bins(self._cv2, shrunk), self._ground(shrunk)))
        velocities = [self._velocity(flow, centre, size) for centre, size in zip(centres, sizes)]
        return Candidates(centres, sizes, np.minimum(scores / self._own, 1), np.reshape(velocities, (-1, 2)))

    def _shrunk(self, frame: np.ndarray) -> np.ndarray:
        size = tuple(max(1, round(length * self.shrink)) for length in frame.shape[1::-1])
        if size == frame.shape[1::-1]:
            return frame
        return np.asarray(self._cv2.resize(frame, size, interpolation=self._cv2.INTER_AREA))

    def _ground(self, shrunk: np.ndarray) -> np.ndarray | None:
        """The pixels (h, w) bool that show the background; None where it is not known."""
        if self._background is None or self._known is None:
            return None
        return shows(shrunk, self._background) & self._known

    def _object_pixels(self, frame: np.ndarray, mask: np.ndarray, shrunk: np.ndarray, box: np.ndarray) -> np.ndarray:
        """The object's pixels (h, w) bool in the shrunk first frame: what is not background of a mask that is a box."""
        height, width = shrunk.shape[:2]
        left, top, right, bottom = np.rint(box).astype(int)
        if self._known is not None and mask.sum() > 0.95 * np.prod(self.size) / self.shrink**2:
            found = np.zeros((height, width), bool)
            found[top:bottom, left:right] = self._known[top:bottom, left:right]
            if found.sum() > 0.2 * np.prod(self.size):
                return found
        pixels = object_pixels(self._cv2, frame, mask).astype(np.uint8)
        return np.asarray(self._cv2.resize(pixels, (width, height), interpolation=self._cv2.INTER_AREA) > 0)

    def _learn(self, bins: np.ndarray, ground: np.ndarray | None, box: np.ndarray) -> None:
        """Colours against those of the rest of the frame, then also against those of the things most like it."""
        rest = np.ones(bins.shape, bool)
        left, top, right, bottom = box.astype(int)
        rest[top : bottom + 1, left : right + 1] = False
        background = np.tile(_frequencies(bins[rest]), (BANDS, 1))
        self._ratios(bins, background)
        y, x = (self.centre[::-1] / _STRIDE).round().astype(int)
        scores = self._scores(bins, ground)
        own = SCALES.index(1.0), min(y, scores.shape[1] - 1), min(x, scores.shape[2] - 1)
        centres, sizes, found = self._peaks(scores)
        elsewhere = (np.abs(centres - self.centre) > self.size * (0.8, 0.5)).any(1) & (found > 0.4 * scores[own])
        if elsewhere.any():
            rivals = [self._bands(bins, *each) for each in zip(centres[elsewhere], sizes[elsewhere])]
            together = [_frequencies(np.concatenate(colours)) for colours in zip(*rivals)]
            self._ratios(bins, (1 - _RIVAL) * background + _RIVAL * np.array(together))
            scores = self._scores(bins, ground)
        self._own = min(max(float(scores[own]), _OWN[0]), _OWN[1])
        self.usual = SCALES[int(scores[:, own[1], own[2]].argmax())]

    def _ratios(self, bins: np.ndarray, background: np.ndarray) -> None:
        """Logarithms of the ratio of the object's frequency of each colour to the background's, by band and in all."""
        rows = (np.arange(len(bins)) + 0.5 - self.centre[1]) / self.size[1] + 0.5
        band = np.clip((rows * BANDS).astype(int), 0, BANDS - 1)
        whole = _frequencies(bins[self.pixels])
        self._by_band = [_ratio(whole, background[0])] * BANDS
        for b in range(BANDS):
            inside = bins[self.pixels & (band == b)[:, None]]
            if len(inside):
                self._by_band[b] = _ratio((_frequencies(inside) + 0.15 * whole) / 1.15, background[b])
        self._in_all = _ratio(whole, background[0])

    def _scores(self, bins: np.ndarray, ground: np.ndarray | None) -> np.ndarray:
        """Scores (scales, h, w) of the places of a frame, every `_STRIDE` pixels."""
        margin = int(max(self.size) * SCALES[-1]) + 4
        bands = [_Sums(self._cv2, self._values(ratio, bins, ground), margin) for ratio in self._by_band]
        in_all = _Sums(self._cv2, self._values(self._in_all, bins, ground), margin)
        return np.stack([self._of_size(bands, in_all, self.size * scale) * scale**_LARGER for scale in SCALES])

    def _of_size(self, bands: list[_Sums], in_all: _Sums, size: np.ndarray) -> np.ndarray:
        width, height = size
        left, right = (round(width * edge) for edge in self.inner)
        right = max(right, left + 1)
        edges = [round(height * (b / BANDS - 0.5)) for b in range(BANDS + 1)]
        score = sum(each.mean(left, a, right, b) for each, a, b in zip(bands, edges[:-1], edges[1:])) / BANDS
        strip, brim = max(1, round(0.35 * width)), max(1, round(0.12 * height))
        far_left, far_right = (round(width * edge) for edge in self._outer)
        top, bottom = edges[0], edges[-1]
        sides = in_all.mean(far_left - strip, top, far_left, bottom)
        sides = sides + in_all.mean(far_right, top, far_right + strip, bottom)
        ends = in_all.mean(left, top - brim, right, top) + in_all.mean(left, bottom, right, bottom + brim)
        around = 0.7 * np.maximum(sides / 2, -1) + 0.3 * np.maximum(ends / 2, -1)
        return np.asarray(score - _SURROUNDINGS * around)

    @staticmethod
    def _values(ratio: np.ndarray, bins: np.ndarray, ground: np.ndarray | None) -> np.ndarray:
        """How much each pixel (H, W) counts for the object."""
        values = ratio[bins]
        return values if ground is None else np.where(ground, np.minimum(values, _GROUND), values + _MOVING)

    def _peaks(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centres, sizes and scores of local maxima, best first."""
        highest = self._cv2.dilate(scores.max(0), np.ones((5, 5), np.uint8))
        s, y, x = np.nonzero((scores >= highest - 1e-6) & (scores > _LEAST))
        order = np.argsort(-scores[s, y, x], kind="stable")[:_MOST]
        s, y, x = s[order], y[order], x[order]
        centres = np.stack((x + _vertex(scores, s, y, x, 2), y + _vertex(scores, s, y, x, 1)), -1)
        return centres * float(_STRIDE), s, scores[s, y, x]

    def _velocity(self, flow: np.ndarray, centre: np.ndarray, size: int) -> np.ndarray:
        """Median motion (2,) in the middle of a place, from the flow to the frame before."""
        half = self.size * SCALES[size] * (0.25, 0.35)
        (left, top), (right, bottom) = np.maximum(centre - half, 0).astype(int), (centre + half).astype(int) + 1
        return np.asarray(-np.median(flow[top:bottom, left:right].reshape(-1, 2), 0))

    def _bands(self, bins: np.ndarray, centre: np.ndarray, size: int) -> list[np.ndarray]:
        """Colours in each band of a place."""
        width, height = self.size * SCALES[size]
        left, right = (max(0, int(centre[0] + width * edge)) for edge in self.inner)
        edges = np.maximum(centre[1] + height * (np.arange(BANDS + 1) / BANDS - 0.5), 0).astype(int)
        return [bins[a:b, left : right + 1].ravel() for a, b in pairwise(edges)]


class _Sums:
    """Means of values (H, W) in a box at every `_STRIDE`-th place, from an integral image. Outside the frame it is 0."""

    def __init__(self, cv2: Any, values: np.ndarray, margin: int) -> None:
        self._height, self._width = values.shape
        padded = cv2.copyMakeBorder(values, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0)
        self._sums, self._margin = cv2.integral(padded), margin

    def mean(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Means (h, w) over columns left to right and rows top to bottom, relative to each place."""
        total = self._at(bottom, right) - self._at(top, right) - self._at(bottom, left) + self._at(top, left)
        return np.asarray(total / ((bottom - top) * (right - left)))

    def _at(self, row: int, column: int) -> np.ndarray:
        row, column = row + self._margin, column + self._margin
        return np.asarray(self._sums[row : row + self._height : _STRIDE, column : column + self._width : _STRIDE])


def _resized(cv2: Any, picture: np.ndarray, like: np.ndarray) -> np.ndarray:
    size = like.shape[1::-1]
    return np.asarray(cv2.resize(picture.astype(np.uint8), size, interpolation=cv2.INTER_AREA))


def _vertex(scores: np.ndarray, s: np.ndarray, y: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """Offset, at most half a place, of the vertex of the parabola through a maximum and its neighbours on an axis."""
    place = [s, y, x]
    last = scores.shape[axis] - 1
    before, after = ([*place[:axis], np.clip(place[axis] + d, 0, last), *place[axis + 1 :]] for d in (-1, 1))
    here, low, high = scores[s, y, x], scores[tuple(before)], scores[tuple(after)]
    bend = np.maximum(2 * here - low - high, 1e-6)
    return np.asarray(np.clip((high - low) / (2 * bend), -0.5, 0.5))


def object_pixels(cv2: Any, frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The object's pixels (H, W) bool: the mask, or of a mask that is a box, what GrabCut finds in it.

    Where GrabCut finds next to nothing or nearly all, those pixels of an ellipse in the box whose colours are rarer
    around the box.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = int(bottom - top), int(right - left)
    if mask.sum() < 0.95 * height * width or min(height, width) < 8:
        return mask
    margin = max(height, width) // 3
    y, x = max(0, top - margin // 2), max(0, left - margin)
    crop = np.ascontiguousarray(frame[y : bottom + margin // 2, x : right + margin])
    labels = np.zeros(crop.shape[:2], np.uint8)
    cv2.setRNGSeed(0)
    rectangle = (int(left - x), int(top - y), width, height)
    if crop.shape[0] > height or crop.shape[1] > width:
        cv2.grabCut(crop, labels, rectangle, np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_RECT)
    found = np.zeros_like(mask)
    found[y : y + crop.shape[0], x : x + crop.shape[1]] = labels % 2 == 1
    found &= mask
    if 0.15 < found.sum() / mask.sum() < 0.9:
        return found
    across = (np.arange(mask.shape[1]) + 0.5 - (left + right) / 2) / (0.38 * width)
    down = (np.arange(mask.shape[0]) + 0.5 - (top + bottom) / 2) / (0.47 * height)
    middle = mask & (across[None] ** 2 + down[:, None] ** 2 <= 1)
    bins = _bins(cv2, crop)
    here = middle[y : y + crop.shape[0], x : x + crop.shape[1]]
    outside = ~mask[y : y + crop.shape[0], x : x + crop.shape[1]]
    if not outside.any():
        return middle
    own = _ratio(_frequencies(bins[here]), _frequencies(bins[outside]))[bins] > 0
    if (own & here).sum() < 0.3 * here.sum():
        return middle
    found = np.zeros_like(mask)
    found[y : y + crop.shape[0], x : x + crop.shape[1]] = own & here
    return found


def _bins(cv2: Any, frame: np.ndarray) -> np.ndarray:
    """The colour of each pixel, a number below `_COLOURS`."""
    lab = cv2.cvtColor(frame, cv2.COLOR_RGB2Lab)
    return np.asarray((_LIGHTNESS[lab[..., 0]] << 6) | (_HUE[lab[..., 1]] << 3) | _HUE[lab[..., 2]])


def _frequencies(bins: np.ndarray) -> np.ndarray:
    """Frequencies of colours, smoothed over neighbouring ones; their sum is 1, or 0 where there is no pixel."""
    counts = np.bincount(bins.ravel(), minlength=_COLOURS).reshape(_SHAPE).astype(float)
    for axis in range(3):
        padded = np.pad(counts, [(int(i == axis),) * 2 for i in range(3)], mode="edge")
        before, here, after = (padded.take(range(k, k + _SHAPE[axis]), axis) for k in range(3))
        counts = (before + 2 * here + after) / 4
    return np.asarray(counts.ravel() / max(counts.sum(), 1e-9))


def _ratio(here: np.ndarray, elsewhere: np.ndarray) -> np.ndarray:
    return np.clip(np.log((here + _RARE) / (elsewhere + _RARE)), -_LIMIT, _LIMIT).astype(np.float32)
