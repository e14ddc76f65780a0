"""Boxes of 54 people of Debian's vtest.avi, with their rule and origin in walkers.json.

walkers.png shows the first set of 26, later_walkers.png the second of 28, half of which is held out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

FILE = Path(__file__).with_name("walkers.json")
CLIP = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
"""Where Debian's package opencv-doc puts the video."""

STEP = 5
"""Frames between two labels, 0.5 s."""

HALVES = ("tuning", "held out")
FIRST_SET = 26
"""Walkers of the first set, whose results were seen: all of them are for tuning."""

State = Literal["visible", "part", "absent"]


@dataclass(frozen=True)
class Walker:
    """A person, from a frame in which they can be seen to 8 s later.

    number  place in the file
    frame   index of the first labelled frame of the video; labels follow every `STEP` frames
    boxes   (17, 4) left, top, right and bottom in pixels; NaN where the person is not visible
    states  of each label: visible, less than half visible (part), or absent from the picture
    """

    number: int
    frame: int
    boxes: np.ndarray
    states: tuple[State, ...]

    @property
    def half(self) -> str:
        """For tuning, or held out: places 1 and 2 of each four of the second set."""
        return HALVES[self.number >= FIRST_SET and (self.number - FIRST_SET) % 4 in (1, 2)]

    @property
    def frames(self) -> np.ndarray:
        return self.frame + STEP * np.arange(len(self.states))


def clip() -> dict[str, Any]:
    """The labelled video: its name, Debian package, SHA-256, frames, frames per second, width and height."""
    found: dict[str, Any] = json.loads(FILE.read_text())["clip"]
    return found


def read_walkers() -> list[Walker]:
    walkers = json.loads(FILE.read_text())["walkers"]
    return [_walker(number, each["frame"], each["moments"]) for number, each in enumerate(walkers)]


def check_clip(path: Path) -> None:
    """Raise ValueError unless `path` is the labelled video."""
    known = clip()
    if hashlib.sha256(path.read_bytes()).hexdigest() != known["sha256"]:
        raise ValueError(f"{path} is not the labelled video; it is in {known['package']}")


def _walker(number: int, frame: int, moments: list[Any]) -> Walker:
    boxes = np.full((len(moments), 4), np.nan)
    states: list[State] = []
    for row, moment in zip(boxes, moments):
        labelled: State = "visible" if isinstance(moment, list) else moment
        states.append(labelled)
        if isinstance(moment, list):
            left, top, width, height, _ = moment
            row[:] = left, top, left + width, top + height
    return Walker(number, frame, boxes, tuple(states))
