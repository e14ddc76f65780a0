"""The flags of `pite.evaluate spatial`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataloaders import paths
from pite.evaluate.flags import EvaluationFlags
from pite.evaluate.protocols import Protocol

Benchmark = Literal["vidstg", "hc_stvg"]


@dataclass(frozen=True, kw_only=True)
class SpatialFlags(EvaluationFlags):
    """Where is what this question is about, in each frame? Scores a file of boxes, one line for each question.

    --ground-truth takes VidSTG's test_annotations.json, with --vidor for its boxes, or HC-STVG's val_v2.json, or the
    test.json of its first version.
    """

    benchmark: Benchmark
    """vidstg or hc_stvg"""
    predictions: Path
    """prediction file, JSON lines with boxes"""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.vidor is None) == (self.benchmark == "vidstg"):
            raise ValueError("--vidor gives the boxes of VidSTG: --benchmark vidstg needs it, and no other takes it")
        if self.questions is not None and self.benchmark == "vidstg":
            raise ValueError("--questions is for HC-STVG: VidSTG's annotations hold questions")

    def inputs(self) -> dict[str, Path | None]:
        return super().inputs() | {"--ground-truth": self.ground_truth, "--predictions": self.predictions}

    def check_paths(self) -> None:
        paths.input_file("--ground-truth", self.ground_truth)
        paths.input_folder("--vidor", self.vidor)
        paths.input_folder("--questions", self.questions)
        paths.input_file("--predictions", self.predictions)
        super().check_paths()
