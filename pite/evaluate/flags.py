"""The flags of pite.evaluate's commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dataloaders import paths
from dataloaders.cli import at_least
from dataloaders.ranks import Ranks
from dataloaders.store.features import Manifest
from dataloaders.store.layout import store_of
from pite.evaluate.grounding import QUESTION
from pite.evaluate.inputs import SPLIT
from pite.evaluate.protocols import Protocol
from pite.families import Name
from pite.flags import DeviceFlags
from pite.lineage import check_model_flag


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(DeviceFlags):
    """The flag of all commands."""

    metrics: Path | None = None
    """also write the scores and counts to this JSON file, which pite.export reads"""

    def outputs(self) -> dict[str, Path | None]:
        """The files that the command writes, by flag."""
        return {"--metrics": self.metrics}

    def inputs(self) -> dict[str, Path | None]:
        """The files that it reads, by flag."""
        return {}

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written, and for an output that is an input."""
        paths.distinct_files(self.outputs(), self.inputs())
        for flag, path in self.outputs().items():
            paths.output_file(flag, path)


@dataclass(frozen=True, kw_only=True)
class RunFlags(EvaluationFlags):
    """Flags of a command in which a model answers questions."""

    family: Name | None = None
    """model family, pite or pg-video-llava; a model of the other one is refused. Any unless given"""
    protocol: Protocol = "strict"
    """strict: exact; published: the predecessor's rules, with their faults, to reproduce its numbers"""
    transcripts: Path | None = None
    """folder of transcripts, VIDEO.json of dataloaders.transcripts or VIDEO.txt, which the prompts of PG-Video-LLaVA quote; a
    video without a file has none"""
    batch_size: int = 32
    """questions per batch, and videos whose frames are in memory"""
    skip_missing: bool = False
    """leave out videos without features, and count them; those that engine.encode could not encode are always left out"""
    overwrite: bool = False
    """replace answers of another model or other questions, which are refused otherwise"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size")

    def check_paths(self) -> None:
        super().check_paths()
        if self.transcripts is not None:
            paths.input_folder("--transcripts", self.transcripts)


@dataclass(frozen=True, kw_only=True)
class AnswerFlags(RunFlags):
    """Flags of a command that scores a file of answers, or a model's answers."""

    NAME: ClassVar[str]
    FILES: ClassVar[tuple[str, ...]]
    """Names of the annotation files in DATA/evaluation."""

    model: Path | None = None
    """a stage's output, an export, or OWNER/NAME on the hub"""
    data: Path | None = None
    """data folder with evaluation/, for --model"""
    store: Path | None = None
    """features that engine.encode made from it, for --model"""
    predictions: Path | None = None
    """prediction file, JSON lines: read, or with --model written, and continued after a kill"""
    ground_truth: tuple[Path, ...] = ()
    """annotation file; with --model that in DATA/evaluation unless given"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and (self.predictions is None or not self.ground_truth):
            raise ValueError(f"{self.NAME} needs --predictions and --ground-truth, or --model, --data and --store")
        if self.model is None and self.transcripts is not None:
            raise ValueError("--transcripts needs --model: they are quoted in its prompts")
        if self.model is not None and (self.data is None or self.store is None):
            raise ValueError(
                "--model needs --data and --store: the held-out annotations and the features of their videos"
            )

    @property
    def given_frames(self) -> int | None:
        """The frames per video that --num-frames gives, in commands that have this flag."""
        return None

    @property
    def truth(self) -> tuple[Path, ...]:
        """The files of the ground truth."""
        if self.ground_truth:
            return self.ground_truth
        assert self.data is not None, "__post_init__ requires one of the two"
        return tuple(self.data / SPLIT / name for name in self.FILES)

    def outputs(self) -> dict[str, Path | None]:
        return super().outputs() | ({} if self.model is None else {"--predictions": self.predictions})

    def inputs(self) -> dict[str, Path | None]:
        flag = "--ground-truth" if self.ground_truth else "--data"
        truth = {f"{flag} ({file.name})": file for file in self.truth}
        return super().inputs() | truth | ({"--predictions": self.predictions} if self.model is None else {})

    def check_paths(self) -> None:
        check_inputs(self.model, self.data, self.store)
        for file in self.truth:
            paths.input_file("--ground-truth" if self.ground_truth else "--data", file)
        if self.model is not None and self.predictions is None and Ranks.read().size > 1:
            raise ValueError("several processes write their answers into one file: give --predictions")
        if self.model is None:
            paths.input_file("--predictions", self.predictions)
        check_predictions(self.predictions)
        super().check_paths()


@dataclass(frozen=True, kw_only=True)
class IntervalFlags(AnswerFlags):
    """Flags of a command whose answers name frames."""

    num_frames: int | None = None
    """frames per video that the indices in the answers count; that of --model, or that in the file of --predictions, or
    100 unless given"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_frames")

    @property
    def given_frames(self) -> int | None:
        return self.num_frames


@dataclass(frozen=True, kw_only=True)
class GroundingFlags(IntervalFlags):
    """When in the video is this sentence? Scores a file of predictions, or a model."""

    NAME: ClassVar[str] = "grounding"
    FILES: ClassVar[tuple[str, ...]] = ("activitynet_captions.json",)

    question: str = QUESTION
    """{} stands for the sentence"""
    histogram: Path | None = None
    """draw how the IoUs are distributed into this PNG file"""
    timeline: Path | None = None
    """draw predicted and true intervals on a time line into this PNG file, the first videos"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ground_truth) > 1:
            raise ValueError("--ground-truth: grounding has one file: score each annotator's alone")
        if self.question.count("{}") != 1:
            raise ValueError(f"--question must hold {{}} once, where the sentence goes, not {self.question!r}")
        for flag, path in (("--histogram", self.histogram), ("--timeline", self.timeline)):
            if path is not None and path.suffix.lower() != ".png":
                raise ValueError(f"{flag} {path}: a PNG is written, so give a name that ends in .png")

    def outputs(self) -> dict[str, Path | None]:
        return super().outputs() | {"--histogram": self.histogram, "--timeline": self.timeline}


@dataclass(frozen=True, kw_only=True)
class TrajectoriesFlags(EvaluationFlags):
    """Where are the mentioned objects? Scores a model's trajectories."""

    model: Path
    """a stage's output, an export, or OWNER/NAME on the hub"""
    data: Path
    """data folder with evaluation/"""
    store: Path
    """features that engine.encode made from it"""
    skip_missing: bool = False
    """leave out videos without features, and count them; those that engine.encode could not encode are always left out"""
    failure_budget: float = 0.01
    """share of records that may be malformed; they are left out and counted"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"--failure-budget must be between 0 and 1, not {self.failure_budget}")

    @property
    def samples(self) -> Path:
        """The file of the held-out answers and their trajectories."""
        return self.data / SPLIT / "pite_143k.jsonl"

    def inputs(self) -> dict[str, Path | None]:
        return super().inputs() | {"--data": self.samples}

    def check_paths(self) -> None:
        check_inputs(self.model, self.data, self.store)
        paths.input_file("--data", self.samples)
        super().check_paths()


def check_predictions(file: Path | None) -> None:
    """Raise ValueError for a file of --predictions in which no run can continue."""
    if file is not None and file.exists() and not file.is_file():
        raise ValueError(f"--predictions {file}: this is no regular file, so no run can continue in it")


def check_inputs(model: Path | None, data: Path | None, store: Path | None) -> None:
    """Raise ValueError for a model, a data folder or a store that does not exist."""
    check_model_flag("--model", model)
    paths.input_folder("--data", data)
    paths.input_folder("--store", store)
    if store is not None:
        Manifest.load(store_of(store, SPLIT))
