"""Videos of moving squares, and what finds them by their colour."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from dataloaders.annotation.steps import Phrase, encode_mask
from pite.ground.objects import Detection

SIDE, COLOURS = 24, {"red": 0, "green": 1, "blue": 2}


class Colours:
    """Finds squares of red, green and blue, with their masks unless `masked` is False."""

    def __init__(self, masked: bool = True) -> None:
        self._masked = masked

    def tags(self, phrases: Sequence[str]) -> list[str]:
        return [f"{c} square" for c in COLOURS if any(c in phrase for phrase in phrases)]

    def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]:
        found = []
        for tag in tags:
            channel = COLOURS[tag.partition(" ")[0]]
            others = np.delete(image, channel, 2).max(-1)
            mask = (image[..., channel] > 128) & (others < 100)
            rows, columns = np.nonzero(mask)
            if len(rows):
                box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)
                found.append(Detection(tag, box, 0.9, encode_mask(mask) if self._masked else None))
        return found


class Squares(Colours):
    """Finds squares of any colour, all under one tag."""

    def tags(self, phrases: Sequence[str]) -> list[str]:
        return ["square"]

    def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]:
        found = Colours.__call__(self, image, ["red square", "blue square", "green square"])
        return [Detection("square", each.box, each.score) for each in found]


def parse(text: str) -> list[Phrase]:
    return [Phrase(match[0], match.start()) for match in re.finditer(r"(?:a|the|two) (?:\w+ )?squares?", text)]


def place(colour: str, frame: int) -> np.ndarray:
    """The true box of a square: red moves right, the others down."""
    left, top = (4 + 3 * frame, 10) if colour == "red" else (40, 4 + 2 * frame)
    return np.array([left, top, left + SIDE, top + SIDE], float)


def write_squares(path: Path, *colours: str, hidden: Sequence[int] = ()) -> Path:
    """20 frames of 128 x 96 at 10 per second, with no square in the `hidden` ones."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(20):
            picture = np.full((96, 128, 3), 40, np.uint8)
            for colour in colours if index not in hidden else ():
                left, top, right, bottom = place(colour, index).astype(int)
                picture[top:bottom, left:right] = np.eye(3)[COLOURS[colour]] * 230
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
