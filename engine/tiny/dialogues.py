"""Dialogues about text logs of scenes, on which the tiny Vicuna is trained.

A log stands in place of a video: for each frame it holds the exact code of what is visible (engine/tiny/code.py).
Descriptions and stills also have the exact positions of the things that they mention, as in stages 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.formats import Where, read_pite
from dataloaders.formats.narratives import read_narrative
from dataloaders.records import Turn
from dataloaders.synthetic.language import (
    GROUNDING_QUESTION,
    instruct_record,
    interval,
    narrative_record,
    pite_record,
    place,
    sentence,
)
from dataloaders.synthetic.scene import Scene, sample_still, sample_video
from engine.tiny.code import encode

LIST_QUESTION = "List the shapes with first and last frame."

KINDS = ("description", "times", "still", "list", "question")
MIX = (0.55, 0.17, 0.15, 0.08, 0.05)
"""Share of each kind of dialogue."""

_WHERE = Where(Path("log"), 0)


@dataclass(frozen=True)
class Dialogue:
    """A log, and questions about it with their answers.

    log    (F, colours, FIELDS) float32, exact code of each frame
    turns  mentions have the path of a thing's centre: (1, F, 2), or (1, 1, 2) in a still
    """

    log: np.ndarray
    turns: tuple[Turn, ...]


def frame_log(scene: Scene, num_frames: int) -> np.ndarray:
    """The code of `num_frames` frames, evenly spaced like a video's."""
    return encode(scene, np.linspace(0, scene.num_frames - 1, num_frames).astype(int))


def grounding_turn(video: Scene, index: int, num_frames: int) -> Turn:
    """The grounding question about thing `index`."""
    thing = video.things[index]
    return Turn(GROUNDING_QUESTION.format(sentence(thing)), f"From {interval(video, thing, num_frames)}.")


def description_turns(video: Scene, num_frames: int, rng: np.random.Generator) -> tuple[Turn, ...]:
    """The video's record of PiTe-143k, as stage 2 reads it with one point per object."""
    record = pite_record("log", video, rng)
    return read_pite(record, _WHERE, Path("logs"), num_frames=num_frames, num_points=1).turns


def _still(rng: np.random.Generator) -> Dialogue:
    still = sample_still(rng)
    sample = read_narrative(narrative_record("log", still, rng), _WHERE, Path("logs"))
    return Dialogue(encode(still, np.zeros(1, int)), sample.turns)


def _listed(video: Scene, index: int, num_frames: int) -> str:
    thing = video.things[index]
    first, last = interval(video, thing, num_frames).split(" to ")
    return f"{thing.colour} {first} {_where(thing.path[0])} {last} {_where(thing.path[-1])}"


def _where(point: np.ndarray) -> str:
    x, y = np.clip(point, 0, 0.999)
    return place(float(x), float(y)).split(" the ")[1]


def sample_dialogue(rng: np.random.Generator, num_frames: int, shares: Sequence[float] = MIX) -> Dialogue:
    """One of `KINDS`, drawn by its share.

    description  of a video, with the time of each event and the path of each thing
    times        the grounding question, about each event in turn
    still        the narrative of a log of one frame, with the place of each thing
    list         each colour with the first and last frame of its event and its places in them, in any order
    question     another one
    """
    kind = rng.choice(KINDS, p=shares)
    if kind == "still":
        return _still(rng)
    video = sample_video(rng)
    order = rng.permutation(len(video.things))
    if kind == "description":
        turns = description_turns(video, num_frames, rng)
    elif kind == "times":
        turns = tuple(grounding_turn(video, i, num_frames) for i in order)
    elif kind == "list":
        turns = (Turn(LIST_QUESTION, f"{', '.join(_listed(video, i, num_frames) for i in order)}."),)
    else:
        other = instruct_record("", video, rng)
        turns = (Turn(other["q"], other["a"]),)
    return Dialogue(frame_log(video, num_frames), turns)
