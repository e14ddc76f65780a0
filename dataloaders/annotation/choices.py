"""The detectors and trackers that a local directory may hold: `model_type` of its config.json decides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dataloaders.annotation.models import Detector, check_type, model_type

if TYPE_CHECKING:
    from dataloaders.annotation.video_masks import VideoTracker


def open_detector(directory: Path, segmenter: Path | None, device: str = "cpu", threshold: float = 0.35) -> Detector:
    """A SAM 3, or a GroundingDINO with an optional SAM. Raises ValueError for another directory."""
    if model_type(directory) in ("sam3_video", "sam3"):
        if segmenter is not None:
            raise ValueError(f"{directory}: a SAM 3 makes masks itself; leave out --segmenter")
        from dataloaders.annotation.sam3 import Sam3Detector

        return Sam3Detector(directory, device, threshold)
    from dataloaders.annotation.grounding import Grounding

    return Grounding(directory, segmenter, device, threshold)


def open_tracker(directory: Path, device: str = "cpu") -> VideoTracker:
    """A SAM 3, or one of `video_masks.KINDS`. Raises ValueError for another directory."""
    from dataloaders.annotation.video_masks import KINDS, VideoSegmenter

    if check_type(directory, ("sam3_video", *KINDS)) != "sam3_video":
        return VideoSegmenter(directory, device)
    from dataloaders.annotation.sam3 import Sam3Tracker

    return Sam3Tracker(directory, device)
