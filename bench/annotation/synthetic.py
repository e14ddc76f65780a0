"""How far tracks of the synthetic world's things are from their true motion, which is known."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.annotation.steps import Masks, Tracks
from dataloaders.annotation.tracking import Moments
from dataloaders.formats.activitynet import Event
from dataloaders.records import ABSENT
from dataloaders.synthetic.render import draw, write_mp4
from dataloaders.synthetic.scene import Scene, sample_video, signed_distance

SIZE, FRAMES = 128, 32
"""Pixels of a side of the videos, and frames of a model, by which the moments are spaced."""

Method = Callable[[Path, Sequence[Moments], Masks], Tracks]

Found = list[tuple[Scene, int, np.ndarray]]
"""Scenes, the index of a thing in each, and its tracks (M, K, 2)."""


@dataclass(frozen=True)
class Agreement:
    """Errors of visible points in fractions of the frame; share of visible points kept, and of kept points hidden."""

    errors: np.ndarray
    kept: float
    wrong: float


def agreement(found: Found) -> Agreement:
    """Compare tracks with the true motion of their things, from each point's first position."""
    errors, visible, both, kept = [], 0, 0, 0
    for scene, index, tracks in found:
        thing, frames = scene.things[index], moments_of(scene, index).frames
        assert tracks.shape[1] == len(frames)
        for k, frame in enumerate(frames):
            truth = tracks[:, 0] + thing.path[frame - thing.first] - thing.path[0]
            seen, shown = (tracks[:, k] != ABSENT).all(-1), ~hidden(scene, index, truth, frame)
            errors += np.linalg.norm(tracks[:, k] - truth, axis=-1)[seen & shown].tolist()
            visible, both, kept = visible + shown.sum(), both + (seen & shown).sum(), kept + seen.sum()
    return Agreement(np.array(errors), both / visible, 1 - both / kept)


def moments_of(scene: Scene, index: int) -> Moments:
    thing = scene.things[index]
    event = Event(scene.seconds(thing.first), scene.seconds(thing.last), "")
    return Moments.of(event, scene.duration, scene.num_frames, FRAMES)


def hidden(scene: Scene, index: int, points: np.ndarray, frame: int) -> np.ndarray:
    """Which points (..., 2) of a thing are hidden in a frame: outside, behind the occluder or behind a later thing."""
    out = ~((points >= 0) & (points <= 1)).all(-1)
    if scene.occluder is not None:
        left, top, right, bottom = scene.occluder
        x, y = points[..., 0], points[..., 1]
        out |= (left <= x) & (x < right) & (top <= y) & (y < bottom)
    for other in scene.things[index + 1 :]:
        if other.first <= frame <= other.last:
            out |= signed_distance(other.shape, points - other.path[frame - other.first]) > 0
    return np.asarray(out)


def exact_mask(scene: Scene, index: int) -> np.ndarray:
    """The thing's visible pixels (SIZE, SIZE) bool in its first frame."""
    thing = scene.things[index]
    centres = (np.arange(SIZE) + 0.5) / SIZE
    grid = np.stack(np.meshgrid(centres, centres), -1)
    inside = signed_distance(thing.shape, grid - thing.path[0]) > 0
    return np.asarray(inside & ~hidden(scene, index, grid, thing.first))


def track_world(videos: int, method: Method) -> Found:
    """Tracks of all things in the first videos of the synthetic world, from their exact masks."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(videos):
            scene = sample_video(np.random.default_rng(seed))
            path = Path(folder) / f"{seed}.mp4"
            write_mp4(path, draw(scene, SIZE))
            things = range(len(scene.things))
            masks: Masks = [[exact_mask(scene, i)] for i in things]
            tracks = method(path, [moments_of(scene, i) for i in things], masks)
            found += [(scene, i, track) for (i, _), track in tracks.items()]
    return found
