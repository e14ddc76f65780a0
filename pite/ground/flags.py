"""The flags of pite.ground."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import at_least, changed
from pite.chat.flags import CLIP
from pite.families import Name
from pite.flags import DeviceFlags
from pite.lineage import check_model_flag

THRESHOLD = 0.35
"""Minimum score of a detection, unless given."""


@dataclass(frozen=True, kw_only=True)
class GrounderFlags(DeviceFlags):
    """Flags of a command that finds the things of a text in a video."""

    detector: Path | None = None
    """folder of a GroundingDINO, MM-GroundingDINO or SAM 3, or of TensorFlow.js's coco-ssd, which finds COCO's 80 kinds of
    things; OpenCV's people detector, which finds nothing else, unless given"""
    tracker: Path | None = None
    """folder of a SAM 2, SAM 3 or EdgeTAM for videos, which carries the masks on and finds a thing again after it was
    hidden; detections are joined by their boxes unless given"""
    threshold: float | None = None
    """minimum score of a detection of --detector, 0 to 1; 0.35 unless given"""
    stanza: Path | None = None
    """folder of Stanza's models, which make the phrases; spaCy's noun chunks unless given"""
    every: float = 0.4
    """seconds between two frames in which things are looked for"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not self.detector:
            raise ValueError("--threshold is for the scores of --detector: give it, too")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must be between 0 and 1, not {self.threshold}")
        if not 0 < self.every < math.inf:
            raise ValueError(f"--every must be more than 0, not {self.every}")

    @property
    def least_score(self) -> float:
        """Of a detection of --detector."""
        return THRESHOLD if self.threshold is None else self.threshold

    def check_grounder(self) -> None:
        """Raise ValueError for a folder that does not exist."""
        paths.input_folder("--detector", self.detector)
        paths.input_folder("--tracker", self.tracker)
        paths.input_folder("--stanza", self.stanza)


@dataclass(frozen=True, kw_only=True)
class MaskFlags(GrounderFlags):
    """Flags of a command that draws masks, too."""

    segmenter: Path | None = None
    """folder of a SAM; masks are what GrabCut finds in a box unless given"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segmenter and not self.detector:
            raise ValueError("--segmenter needs the boxes of a detector; give --detector, too")

    def check_grounder(self) -> None:
        super().check_grounder()
        paths.input_folder("--segmenter", self.segmenter)


def given(flags: GrounderFlags) -> list[str]:
    """The flags of grounding that have another value than their default."""
    own = fields(MaskFlags if isinstance(flags, MaskFlags) else GrounderFlags)
    others = {field.name for field in fields(DeviceFlags)}
    return changed(flags, *(field.name for field in own if field.name not in others))


@dataclass(frozen=True, kw_only=True)
class GroundFlags(MaskFlags):
    """Answer a question about videos, and find what the answer names: boxes and masks over time.

    Writes NAME.json and NAME.mp4 for each video. A video that has them is skipped, so a killed run continues with the
    same command. --answer grounds a text that is given, without a model.
    """

    video: tuple[Path, ...]
    """any files that FFmpeg decodes"""
    output: Path
    """folder for NAME.json and NAME.mp4"""
    query: str | None = None
    """the question"""
    model: Path | None = None
    """a stage's output, an export, or OWNER/NAME on the hub, which answers it"""
    answer: str | None = None
    """ground this text instead"""
    family: Name | None = None
    """model family, pite or pg-video-llava; a model of the other one is refused. Any unless given"""
    clip: str = CLIP
    """path or Hugging Face name of the image tower that made the model's features"""
    max_new_tokens: int = 256
    """most tokens of an answer"""
    seconds: tuple[float, float] | None = None
    """ground only the frames between these two times"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.answer is None) == (self.query is None or self.model is None):
            raise ValueError("give --query and --model, or --answer: the text to ground")
        unused = changed(self, "query", "model", "family", "clip", "max_new_tokens")
        if self.answer is not None and unused:
            raise ValueError(f"{' and '.join(unused)}: --answer is grounded without a model; leave one of them out")
        if not (self.answer or self.query or "").strip():
            raise ValueError("the text is empty: give words in --query or --answer")
        at_least(self, 1, "max_new_tokens")
        if self.seconds is not None and not 0 <= self.seconds[0] < self.seconds[1] < math.inf:
            raise ValueError(f"--seconds must be a start and a later end, not {self.seconds[0]:g} {self.seconds[1]:g}")

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        for video in self.video:
            paths.input_file("--video", video)
        (name, number), *_ = Counter(video.stem for video in self.video).most_common(1)
        if number > 1:
            raise ValueError(f"--video: {number} videos are named {name!r}, and each writes {name}.json: rename them")
        if self.model is not None:
            check_model_flag("--model", self.model)
        paths.model("--clip", self.clip)
        self.check_grounder()
        paths.output_folder("--output", self.output)
        written = {
            f"--output ({v.stem}{s})": self.output / f"{v.stem}{s}" for v in self.video for s in (".json", ".mp4")
        }
        paths.distinct_files(written, {f"--video ({video.name})": video for video in self.video})
