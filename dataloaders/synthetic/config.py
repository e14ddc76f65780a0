"""The contents of a synthetic world, and the flags of the command that makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import flag
from dataloaders.cpu import available_cores
from dataloaders.logs import LogFlags


@dataclass(frozen=True)
class WorldConfig:
    """Contents of a world. The same configuration always gives the same bytes.

    videos      training videos, shared by stages 2 and 3
    evaluation  held-out videos
    images      narrated stills of stage 1
    frames      N, for the two-digit frame indices in stage 3's answers
    size        width and height in pixels
    seed        random seed
    twins       share of the videos that show two equal things, one after the other, with different motions
    """

    videos: int = 3400
    evaluation: int = 400
    images: int = 3400
    frames: int = 32
    size: int = 64
    seed: int = 0
    twins: float = 0.0

    def __post_init__(self) -> None:
        for name in ("videos", "evaluation", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not 2 <= self.frames <= 100:
            raise ValueError(f"--frames must be 2 to 100 (indices have two digits), not {self.frames}")
        if self.size < 16 or self.size % 2:
            raise ValueError(f"--size must be an even number of at least 16 pixels (H.264 needs even), not {self.size}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, not {self.seed}")
        if not 0 <= self.twins <= 1:
            raise ValueError(f"--twins is a share, 0 to 1, not {self.twins}")


@dataclass(frozen=True, kw_only=True)
class SyntheticFlags(LogFlags):
    """Make the synthetic world."""

    output: Path = flag(positional=True)
    """folder to make; the command can be repeated"""
    videos: int = WorldConfig.videos
    """training videos"""
    evaluation: int = WorldConfig.evaluation
    """held-out videos"""
    images: int | None = None
    """narrated stills of stage 1; as many as --videos unless given"""
    frames: int = WorldConfig.frames
    """N frames of a video that the answers count, such as "From 03 to 17": encode with the same --num-frames"""
    size: int = WorldConfig.size
    """width and height in pixels"""
    seed: int = WorldConfig.seed
    """random seed"""
    twins: float = WorldConfig.twins
    """share of videos with two equal things that differ in their motion alone, for grounding that needs motion"""
    processes: int = available_cores()
    """worker processes"""

    def __post_init__(self) -> None:
        self.world()

    def world(self) -> WorldConfig:
        """The world to make. Raises ValueError, naming the flag."""
        images = self.videos if self.images is None else self.images
        return WorldConfig(self.videos, self.evaluation, images, self.frames, self.size, self.seed, self.twins)

    def check_paths(self) -> None:
        """Raise ValueError if the folder cannot be made."""
        paths.output_folder("OUTPUT", self.output)
