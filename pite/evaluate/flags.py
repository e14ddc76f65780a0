"""The flags of pite.evaluate's two commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import at_least
from dataloaders.formats import Split
from dataloaders.store.features import Manifest
from dataloaders.store.layout import store_of
from pite.evaluate.grounding import QUESTION
from pite.evaluate.protocols import Protocol
from pite.flags import DeviceFlags
from pite.lineage import check_model_flag

SPLIT: Split = "evaluation"
"""The held-out split: its folder in a data folder, and the first part of its features' keys."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(DeviceFlags):
    """The flag of both commands."""

    metrics: Path | None = None
    """also write the scores and counts to this JSON file, which pite.export reads"""


@dataclass(frozen=True, kw_only=True)
class GroundingFlags(EvaluationFlags):
    """When in the video is this sentence? Scores a file of predictions, or a model."""

    model: Path | None = None
    """a stage's output, an export, or OWNER/NAME on the hub"""
    data: Path | None = None
    """data folder with evaluation/, for --model"""
    store: Path | None = None
    """features that engine.encode made from it, for --model"""
    predictions: Path | None = None
    """prediction file, JSON lines: read, or with --model written"""
    ground_truth: Path | None = None
    """ActivityNet Captions; with --model DATA/evaluation/activitynet_captions.json unless given"""
    num_frames: int | None = None
    """frames per video that the indices in the answers count; that of --model, or that in the file of --predictions, or
    100 unless given"""
    question: str = QUESTION
    """{} stands for the sentence"""
    protocol: Protocol = "strict"
    """strict: indices of one to three digits, exact IoU; published: the predecessor's two digits and rounded IoU"""
    batch_size: int = 32
    """questions per batch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size", "num_frames")
        if self.model is None and (self.predictions is None or self.ground_truth is None):
            raise ValueError("grounding needs --predictions and --ground-truth, or --model, --data and --store")
        if self.model is not None and (self.data is None or self.store is None):
            raise ValueError(
                "--model needs --data and --store: the held-out annotations and the features of their videos"
            )
        if self.question.count("{}") != 1:
            raise ValueError(f"--question must hold {{}} once, where the sentence goes, not {self.question!r}")

    @property
    def truth(self) -> Path:
        """The file of the ground truth."""
        if self.ground_truth is not None:
            return self.ground_truth
        assert self.data is not None, "__post_init__ requires one of the two"
        return self.data / SPLIT / "activitynet_captions.json"

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        _check_inputs(self.model, self.data, self.store)
        paths.input_file("--data" if self.ground_truth is None else "--ground-truth", self.truth)
        check = paths.input_file if self.model is None else paths.output_file
        check("--predictions", self.predictions)
        paths.output_file("--metrics", self.metrics)


@dataclass(frozen=True, kw_only=True)
class TrajectoriesFlags(EvaluationFlags):
    """Where are the mentioned objects? Scores a model's trajectories."""

    model: Path
    """a stage's output, an export, or OWNER/NAME on the hub"""
    data: Path
    """data folder with evaluation/"""
    store: Path
    """features that engine.encode made from it"""

    @property
    def samples(self) -> Path:
        """The file of the held-out answers and their trajectories."""
        return self.data / SPLIT / "pite_143k.jsonl"

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        _check_inputs(self.model, self.data, self.store)
        paths.input_file("--data", self.samples)
        paths.output_file("--metrics", self.metrics)


def _check_inputs(model: Path | None, data: Path | None, store: Path | None) -> None:
    check_model_flag("--model", model)
    paths.input_folder("--data", data)
    paths.input_folder("--store", store)
    if store is not None:
        Manifest.load(store_of(store, SPLIT))
