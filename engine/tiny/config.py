"""The settings of the tiny models' training, and the flags of the command that trains them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import at_least, flag
from dataloaders.logs import LogFlags


@dataclass(frozen=True)
class TinyConfig:
    """training; the same settings give the same weights on the same kind of CPU"""

    clip_steps: int = 16000
    """CLIP's steps, of 128 stills each"""
    vicuna_steps: int = 15000
    """the Vicuna's steps, of 32 dialogues each"""
    width: int = 128
    """the Vicuna's hidden size d, a multiple of 32 (bench.scaling)"""
    frames: int = 32
    """N, entries of a log, and so frames of a video later"""
    motion: bool = True
    """train the Vicuna on velocities and paths too; without them its training has no trajectory, as that of Vicuna
    (bench.ablation)"""
    seed: int = 0
    """seed of weights and data"""

    def __post_init__(self) -> None:
        at_least(self, 1, "clip_steps", "vicuna_steps")
        if not 2 <= self.frames <= 100:
            raise ValueError(f"--frames must be 2 to 100 (indices have two digits), not {self.frames}")
        at_least(self, 0, "seed")
        if self.width < 32 or self.width % 32:
            raise ValueError(f"--width must be a multiple of 32, not {self.width}")


@dataclass(frozen=True, kw_only=True)
class TinyFlags(LogFlags):
    """Train the demo's two initial models, OUTPUT/clip and OUTPUT/vicuna in Hugging Face format.

    The same command continues a training that was killed, to the same weights.
    """

    output: Path = flag(positional=True)
    """output folder; models that it already holds are kept"""
    training: TinyConfig = TinyConfig()

    def check_paths(self) -> None:
        """Raise ValueError if the folder cannot be made."""
        paths.output_folder("OUTPUT", self.output)
