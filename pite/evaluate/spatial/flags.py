"""The flags of `pite.evaluate spatial`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataloaders import paths
from dataloaders.cli import changed
from pite.chat.flags import CLIP
from pite.evaluate.flags import EvaluationFlags, check_predictions
from pite.evaluate.protocols import Protocol
from pite.families import Name
from pite.ground.flags import GrounderFlags, given
from pite.lineage import check_model_flag

Benchmark = Literal["vidstg", "hc_stvg"]


@dataclass(frozen=True, kw_only=True)
class SpatialFlags(EvaluationFlags, GrounderFlags):
    """Where is what this question is about, in each frame? Scores a file of boxes, or a model whose answers are grounded.

    --ground-truth takes VidSTG's test_annotations.json, with --vidor for its boxes, or HC-STVG's val_v2.json, or the
    test.json of its first version.
    """

    benchmark: Benchmark
    """vidstg or hc_stvg"""
    predictions: Path
    """prediction file, JSON lines with boxes: read, or with --model written, and continued after a kill"""
    ground_truth: Path
    """annotation file"""
    vidor: Path | None = None
    """folder of VidOR's annotations, {vid}.json in it or in its folders, for vidstg"""
    questions: Path | None = None
    """folder of {number}.json with Q and A, made of HC-STVG's captions as in PG-Video-LLaVA's evaluation; the captions
    are the questions unless given"""
    protocol: Protocol = "strict"
    """strict: each annotated frame, with one box at most; published: PG-Video-LLaVA's evaluation, five frames a second, its
    frame numbers, and the best of any number of boxes"""
    model: Path | None = None
    """a stage's output, an export, or OWNER/NAME on the hub, which answers the questions"""
    videos: Path | None = None
    """folder of the benchmark's videos, in it or in its folders, for --model"""
    family: Name | None = None
    """model family, pite or pg-video-llava; a model of the other one is refused. Any unless given"""
    clip: str = CLIP
    """path or Hugging Face name of the image tower that made the model's features"""
    skip_missing: bool = False
    """count questions about videos that are not in --videos as failures, which are refused otherwise"""
    overwrite: bool = False
    """replace answers of another model or other questions, which are refused otherwise"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != (self.videos is None):
            raise ValueError("--model and --videos belong together: the model answers questions about these videos")
        unused = changed(self, "family", "clip", "skip_missing", "overwrite") + given(self)
        if self.model is None and unused:
            raise ValueError(f"{' and '.join(unused)}: without --model the boxes are those in --predictions")
        if (self.vidor is None) == (self.benchmark == "vidstg"):
            raise ValueError("--vidor gives the boxes of VidSTG: --benchmark vidstg needs it, and no other takes it")
        if self.questions is not None and self.benchmark == "vidstg":
            raise ValueError("--questions is for HC-STVG: VidSTG's annotations hold questions")

    def outputs(self) -> dict[str, Path | None]:
        return super().outputs() | ({} if self.model is None else {"--predictions": self.predictions})

    def inputs(self) -> dict[str, Path | None]:
        predictions = {"--predictions": self.predictions} if self.model is None else {}
        return super().inputs() | {"--ground-truth": self.ground_truth} | predictions

    def check_paths(self) -> None:
        paths.input_file("--ground-truth", self.ground_truth)
        paths.input_folder("--vidor", self.vidor)
        paths.input_folder("--questions", self.questions)
        if self.model is None:
            paths.input_file("--predictions", self.predictions)
        else:
            check_model_flag("--model", self.model)
            paths.input_folder("--videos", self.videos)
            paths.model("--clip", self.clip)
            self.check_grounder()
            check_predictions(self.predictions)
        super().check_paths()
