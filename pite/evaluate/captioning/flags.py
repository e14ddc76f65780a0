"""The flags of `pite.evaluate captioning`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import at_least
from pite.evaluate.captioning import java
from pite.evaluate.flags import EvaluationFlags
from pite.evaluate.protocols import Protocol


@dataclass(frozen=True, kw_only=True)
class CaptioningFlags(EvaluationFlags):
    """Which events does the video show, and when? Scores a file of predictions."""

    predictions: Path
    """prediction file, JSON lines"""
    ground_truth: tuple[Path, ...]
    """ActivityNet Captions, a file for each annotator: val_1.json val_2.json"""
    num_frames: int | None = None
    """frames per video that the indices in the answers count; that in the file of --predictions, or 100 unless given"""
    protocol: Protocol = "strict"
    """strict: videos without an answer count as 0, METEOR gets prediction and reference the right way round; published:
    as the predecessor's script"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_frames")

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written, and without Java or pycocoevalcap."""
        paths.input_file("--predictions", self.predictions)
        for path in self.ground_truth:
            paths.input_file("--ground-truth", path)
        paths.output_file("--metrics", self.metrics)
        java.package()
