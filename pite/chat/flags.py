"""The flags of pite.chat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import at_least
from pite.flags import DeviceFlags
from pite.lineage import check_model_flag

CLIP = "openai/clip-vit-large-patch14"
"""The paper's encoder."""


@dataclass(frozen=True, kw_only=True)
class ChatFlags(DeviceFlags):
    """Answer one question about one video.

    --trajectory draws the predicted trajectory of each object that the answer names: during the interval that the
    object's sentence gives, or in every frame if it gives none. The objects are found by rule (pite/mentions.py), or
    named by --phrase.
    """

    model: Path
    """a stage's output, an export, or OWNER/NAME on the hub"""
    video: Path
    """any file that FFmpeg decodes"""
    query: str
    """the question"""
    clip: str = CLIP
    """path or Hugging Face name of the CLIP that made the model's features"""
    trajectory: Path | None = None
    """draw the answer's objects into this MP4 file"""
    phrase: tuple[str, ...] = ()
    """draw these phrases of the answer instead of the phrases found by rule; can be repeated"""
    temperature: float = 0.0
    """0 is greedy"""
    max_new_tokens: int = 1024
    """most tokens of the answer; fewer where the language model's context ends"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_new_tokens")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be 0 or more, not {self.temperature}")
        if not self.query.strip():
            raise ValueError("--query is empty: give a question about the video")
        if self.phrase and self.trajectory is None:
            raise ValueError("--phrase chooses what is drawn: give --trajectory FILE.mp4 too")
        if not all(phrase.strip() for phrase in self.phrase):
            raise ValueError("--phrase is empty: give words of the answer")
        if self.trajectory is not None and self.trajectory.suffix.lower() != ".mp4":
            raise ValueError(f"--trajectory {self.trajectory}: an MP4 is written, so give a name that ends in .mp4")

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        check_model_flag("--model", self.model)
        paths.input_file("--video", self.video)
        paths.model("--clip", self.clip)
        paths.output_file("--trajectory", self.trajectory)
