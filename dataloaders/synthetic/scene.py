"""Scenes of synthetic videos: shapes that appear, move and vanish, and the positions of their key points.

Lengths are fractions of the (square) frame, from the top left. Times are indices of source frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 50),
    "magenta": (220, 50, 210),
    "cyan": (40, 210, 220),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
RADIUS = 0.13
FRAMES_PER_SECOND = 10
OCCLUDED = 0.3
"""Share of scenes with an opaque grey block in them."""
KEY_POINTS = np.array([(0.0, 0.0), (-0.45, 0.3), (0.45, 0.3), (0.0, -0.6), (0.0, 0.65)])
"""(5, 2) offsets from a shape's centre in radii; all are inside each shape. A model of P points uses the first P."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One coloured shape, visible from source frame `first` to `last`, both included.

    path   (last - first + 1, 2) centre of the shape in each of those frames
    """

    colour: str
    shape: str
    direction: str
    first: int
    last: int
    path: np.ndarray

    @property
    def phrase(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A video before it is drawn. Later things are drawn over earlier ones, the occluder over all of them.

    num_frames  source frames
    background  grey level, 0 to 255
    occluder    (left, top, right, bottom) of an opaque block, or None
    """

    num_frames: int
    background: int
    things: tuple[Thing, ...]
    occluder: Box | None = None

    @property
    def duration(self) -> float:
        """Seconds, as in the container: all frames have the same duration."""
        return self.num_frames / FRAMES_PER_SECOND

    def seconds(self, frame: int) -> float:
        """Time of a source frame on the clock of the records: the last frame is at `duration`."""
        return round(frame / max(self.num_frames - 1, 1) * self.duration, 6)


def signed_distance(shape: str, offset: np.ndarray) -> np.ndarray:
    """Distance of offsets (..., 2) from the shape's edge, positive inside. In fractions of the frame."""
    x, y = offset[..., 0], offset[..., 1]
    if shape == "circle":
        return RADIUS - np.hypot(x, y)
    if shape == "square":
        return 0.88 * RADIUS - np.maximum(np.abs(x), np.abs(y))
    # An upward triangle: base at 0.8 r, apex at -1.1 r, half base r.
    slope = np.hypot(1.0, 1.9)
    return np.minimum(0.8 * RADIUS - y, (y + 1.1 * RADIUS - 1.9 * np.abs(x)) / slope)


def key_point_tracks(scene: Scene, index: int) -> np.ndarray:
    """Positions of the key points of thing `index` during its event.

    Returns (P, K, 2) float64, K = last - first + 1, rounded to 1e-4; (-1, -1) where a point is outside the frame,
    behind the occluder, or under a thing drawn later.
    """
    thing = scene.things[index]
    points = thing.path[None] + RADIUS * KEY_POINTS[:, None]
    visible = np.asarray(((points >= 0) & (points <= 1)).all(-1))
    if scene.occluder is not None:
        left, top, right, bottom = scene.occluder
        x, y = points[..., 0], points[..., 1]
        visible &= ~((left <= x) & (x < right) & (top <= y) & (y < bottom))
    for other in scene.things[index + 1 :]:
        begin, end = max(thing.first, other.first), min(thing.last, other.last) + 1
        if begin < end:
            offset = (
                points[:, begin - thing.first : end - thing.first] - other.path[begin - other.first : end - other.first]
            )
            visible[:, begin - thing.first : end - thing.first] &= signed_distance(other.shape, offset) < 0
    return np.where(visible[..., None], points.round(4), -1.0)


def _sample_path(rng: np.random.Generator, direction: str, length: int) -> np.ndarray:
    """A path (length, 2). Half of the paths are bowed sideways; one straight path in six leaves the frame."""
    progress = np.linspace(0, 1, length)
    bow = rng.choice([-1, 1]) * rng.uniform(0.1, 0.2) if rng.random() < 0.5 else 0.0
    leaves = bow == 0 and rng.random() < 1 / 6
    travel = rng.uniform(0.2, 0.4)
    begin = 1 + 0.8 * RADIUS - travel if leaves else rng.uniform(0.12, 0.88 - travel)
    along = begin + travel * progress
    aside = rng.uniform(0.12 + max(0, -bow), 0.88 - max(0, bow)) + bow * np.sin(np.pi * progress)
    if direction in ("left", "up"):
        along = 1 - along
    return np.stack((along, aside) if direction in ("left", "right") else (aside, along), -1)


def _distinct(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """`count` (colour, shape) pairs of distinct colours."""
    return [(str(colour), str(rng.choice(SHAPES))) for colour in rng.permutation(list(COLOURS))[:count]]


def _block(rng: np.random.Generator, centre: np.ndarray) -> Box:
    """An occluder around a point. Its edges are on a grid of 1/32, so that they are between pixels."""
    half = rng.uniform(0.06, 0.11, 2)
    left, top, right, bottom = (
        float(edge) for edge in np.round(np.concatenate((centre - half, centre + half)) * 32) / 32
    )
    return left, top, right, bottom


def sample_video(rng: np.random.Generator) -> Scene:
    """A scene of 48 to 96 source frames with 1 to 3 events of 0.15 to 0.45 of its length each, in order of start."""
    num_frames = int(rng.integers(48, 97))
    things = []
    for colour, shape in _distinct(rng, int(rng.choice([1, 2, 3], p=[0.2, 0.4, 0.4]))):
        length = max(2, int(rng.uniform(0.15, 0.45) * num_frames))
        first = int(rng.integers(0, num_frames - length + 1))
        direction = str(rng.choice(list(DIRECTIONS)))
        path = _sample_path(rng, direction, length)
        things.append(Thing(colour, shape, direction, first, first + length - 1, path))
    things.sort(key=lambda thing: thing.first)
    scene = Scene(num_frames, int(rng.integers(20, 60)), tuple(things))
    if rng.random() < OCCLUDED:
        behind = things[int(rng.integers(len(things)))].path
        hidden = replace(scene, occluder=_block(rng, behind[len(behind) // 2]))
        # No occluder that hides a thing most of the time: its event could not be learned.
        if all((key_point_tracks(hidden, i)[0, :, 0] >= 0).mean() > 0.5 for i in range(len(things))):
            return hidden
    return scene


def sample_twins(rng: np.random.Generator) -> Scene:
    """A scene of 48 to 96 source frames with two equal things, one after the other, that move in different directions."""
    num_frames = int(rng.integers(48, 97))
    (pair,) = _distinct(rng, 1)
    lengths = [max(2, int(rng.uniform(0.15, 0.45) * num_frames)) for _ in range(2)]
    pauses = np.sort(rng.integers(0, num_frames - sum(lengths) + 1, 2))
    starts = int(pauses[0]), int(pauses[1]) + lengths[0]
    directions = rng.permutation(list(DIRECTIONS))[:2]
    things = tuple(
        Thing(*pair, str(direction), first, first + length - 1, _sample_path(rng, str(direction), length))
        for direction, first, length in zip(directions, starts, lengths)
    )
    return Scene(num_frames, int(rng.integers(20, 60)), things)


def sample_still(rng: np.random.Generator, things: list[tuple[str, str]] | None = None) -> Scene:
    """A scene of one frame with 1 to 3 things, or the given (colour, shape) pairs, whose centres are not covered."""
    pairs = _distinct(rng, int(rng.integers(1, 4))) if things is None else things
    centres: list[np.ndarray] = []
    while len(centres) < len(pairs):
        centre = rng.uniform(0.1, 0.9, 2)
        if all(np.hypot(*(centre - other)) > 1.5 * RADIUS for other in centres):
            centres.append(centre)
    placed = tuple(Thing(*pair, direction="", first=0, last=0, path=c[None]) for pair, c in zip(pairs, centres))
    still = Scene(1, int(rng.integers(20, 60)), placed)
    if rng.random() < OCCLUDED:
        left, top, right, bottom = block = _block(rng, rng.uniform(0.1, 0.9, 2))
        if not any(left <= x < right and top <= y < bottom for x, y in centres):
            return replace(still, occluder=block)
    return still


def sample_things(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Up to three (colour, shape) pairs of distinct colours; none in one case of ten."""
    return _distinct(rng, int(rng.choice(4, p=[0.1, 0.25, 0.3, 0.35])))
