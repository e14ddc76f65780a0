"""The flags of `pite.evaluate captioning`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pite.evaluate.captioning import QUESTION, java
from pite.evaluate.flags import IntervalFlags


@dataclass(frozen=True, kw_only=True)
class CaptioningFlags(IntervalFlags):
    """Which events does the video show, and when? Scores a file of predictions, or a model.

    --ground-truth takes a file for each annotator: val_1.json val_2.json. With --protocol strict, videos without an
    answer count as 0, and METEOR gets prediction and reference the right way round.
    """

    NAME: ClassVar[str] = "captioning"
    FILES: ClassVar[tuple[str, ...]] = ("activitynet_captions.json", "activitynet_captions_2.json")

    question: str = QUESTION
    """the question about each video"""

    @property
    def truth(self) -> tuple[Path, ...]:
        """The file of each annotator; in a data folder the second one may be missing."""
        first, *others = super().truth
        return (first, *(file for file in others if self.ground_truth or file.exists()))

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written, and without Java or pycocoevalcap."""
        super().check_paths()
        java.package()
