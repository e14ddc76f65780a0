"""What the parts of `bench.encode` measure, and when they stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    device      "cuda" or "cpu"
    folder      for the files that are written
    files       folder of videos to use instead; None writes some
    kinds       codec and size of the files that are written, such as "H.264-360p"; "mixed" is several of both and of lengths
    number      files of each kind
    sessions    files that are decoded at once on a GPU
    rounds      of each measurement
    budget      seconds for each part, after which no measurement of it is started
    clip        folder of a CLIP model; None for ViT-L/14 with random weights
    image_size  of the random CLIP
    num_frames  frames of a file that are encoded
    batch       frames of a forward pass
    """

    device: str
    folder: Path
    files: Path | None = None
    kinds: tuple[str, ...] = ("H.264-360p", "H.264-720p", "mixed", "VP9-360p")
    number: int = 24
    sessions: tuple[int, ...] = (1, 2, 4, 7, 14)
    rounds: int = 2
    budget: float = 230.0
    clip: Path | None = None
    image_size: int = 224
    num_frames: int = 100
    batch: int = 200


@dataclass
class Clock:
    """The time of one part."""

    budget: float
    begin: float = field(default_factory=time.perf_counter)

    @property
    def is_up(self) -> bool:
        """No further measurement is started."""
        return time.perf_counter() - self.begin > self.budget


def rates(run: Callable[[], int], rounds: int) -> dict[str, Any]:
    """Frames per second of the median, slowest and fastest round; `run` returns the number of frames."""
    measured = []
    for _ in range(rounds):
        begin = time.perf_counter()
        frames = run()
        measured.append(frames / (time.perf_counter() - begin))
    return {"frames_per_second": median(measured), "slow": min(measured), "fast": max(measured)}


def problem_of(error: Exception) -> str:
    """The first line of an error, for a row."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
