"""`pite.evaluate all`: every benchmark whose files a data folder has, and the paper's tables.

OUTPUT/MODEL/grounding.jsonl, captioning.jsonl, msvd_qa.jsonl, ...    answers, continued after a kill
OUTPUT/MODEL/metrics.json                                            all scores and counts
OUTPUT/tables.md, OUTPUT/tables.json                                 the paper's tables with rows of ours
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dataloaders import paths
from dataloaders.files import write_atomically
from dataloaders.ranks import Ranks
from pite.evaluate.captioning.flags import CaptioningFlags
from pite.evaluate.commands import find_inputs, score_answers, score_trajectories
from pite.evaluate.flags import AnswerFlags, GroundingFlags, RunFlags, TrajectoriesFlags, check_inputs
from pite.evaluate.inputs import SPLIT
from pite.evaluate.qa.benchmarks import FILES
from pite.evaluate.qa.command import check_judge
from pite.evaluate.qa.flags import JudgeFlags, QaFlags
from pite.evaluate.reports import Report
from pite.evaluate.tables import Metrics, as_json, markdown

if TYPE_CHECKING:
    from pite.evaluate.answering import Model

Name = Literal[
    "grounding", "captioning", "msvd_qa", "msrvtt_qa", "activitynet_qa", "tgif_qa", "video_chatgpt", "trajectories"
]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True, kw_only=True)
class AllFlags(RunFlags, JudgeFlags):
    """All benchmarks that a data folder has, and the paper's Tables 3 and 4 (5 for several models)."""

    model: tuple[Path, ...]
    """a stage's output, an export, or OWNER/NAME on the hub; several are rows of one table"""
    data: Path
    """data folder with evaluation/"""
    store: Path
    """features that engine.encode made from it"""
    output: Path
    """folder for answers, metrics and tables; the same command continues in it"""
    benchmarks: tuple[Name, ...] = ()
    """benchmarks to run; those whose files are in DATA/evaluation unless given"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels()
        if self.metrics is not None and len(self.model) > 1:
            raise ValueError("--metrics is for one model: those of each --model are in OUTPUT/MODEL/metrics.json")
        if "video_chatgpt" in self.benchmarks and self.judge_model is None:
            raise ValueError("video_chatgpt is scored by a judge: give --judge-model, and --judge-url or a directory")

    def check_paths(self) -> None:
        super().check_paths()
        for model in self.model:
            check_inputs(model, self.data, self.store)
        paths.output_folder("--output", self.output)
        names = self.names()
        if not names:
            raise ValueError(
                f"--data {self.data}: {SPLIT}/ holds the files of no benchmark, such as {GroundingFlags.FILES[0]} "
                "(docs/evaluation.md lists them)"
            )
        for _, model in self.labels():
            for name in names:
                self._check(name, model)

    def _check(self, name: Name, model: Path) -> None:
        try:
            self.flags_of(name, model).check_paths()
        except ValueError as error:
            if name != "captioning" or self.benchmarks:
                raise
            others = " ".join(each for each in self.names() if each != name)
            raise ValueError(f"{error}; or leave it out with --benchmarks {others}") from None

    def labels(self) -> list[tuple[str, Path]]:
        """A name for each model, for tables and folders: the last parts of its path that differ from the others'."""
        parts = [(model.resolve() if model.is_dir() else model).parts for model in self.model]
        # A stage's output is RUN/stage3/final.
        fewest = 3 if any(each[-1] == "final" for each in parts) else 1
        for count in range(fewest, max(fewest, *map(len, parts)) + 1):
            found = ["-".join(part.strip("/") or "root" for part in each[-count:]) for each in parts]
            if len(set(found)) == len(found):
                return list(zip(found, self.model))
        raise ValueError("--model names a model twice")

    def names(self) -> list[Name]:
        """The benchmarks to run."""
        if self.benchmarks:
            return [name for name in NAMES if name in self.benchmarks]
        return [name for name in NAMES if self._has(name)]

    def _has(self, name: Name) -> bool:
        if name == "video_chatgpt" and self.judge_model is None:
            return False
        return all((self.data / SPLIT / file).is_file() for file in _files(name))

    def flags_of(self, name: Name, model: Path) -> AnswerFlags | TrajectoriesFlags:
        """The flags of one benchmark's own command."""
        folder = self.folder(model)
        common: dict[str, Any] = {"model": model, "data": self.data, "store": self.store, "device": self.device}
        common |= {"skip_missing": self.skip_missing, "log_level": self.log_level}
        if name == "trajectories":
            return TrajectoriesFlags(**common)
        common |= {"predictions": folder / f"{name}.jsonl", "protocol": self.protocol}
        common |= {"batch_size": self.batch_size, "overwrite": self.overwrite}
        if name == "grounding":
            return GroundingFlags(**common)
        if name == "captioning":
            return CaptioningFlags(**common)
        judge = ("judge_model", "judge_url", "judge_key", "price_per_million", "concurrency", "retries", "timeout")
        return QaFlags(**common, benchmark=name, **{flag: getattr(self, flag) for flag in judge})

    def folder(self, model: Path) -> Path:
        return self.output / next(label for label, each in self.labels() if each == model)


def _files(name: Name) -> tuple[str, ...]:
    """The files in the evaluation folder that a benchmark needs."""
    match name:
        case "trajectories":
            return ("pite_143k.jsonl",)
        case "grounding" | "captioning":
            return GroundingFlags.FILES
        case _:
            return FILES[name]


@dataclass(frozen=True)
class Tables(Report):
    """The tables as text; --metrics gets the numbers of the benchmarks."""

    by_report: Metrics = field(default_factory=dict)

    def metrics(self) -> dict[str, dict[str, str | float]]:
        return {name: dict(numbers) for name, numbers in self.by_report.items()}


def score_all(flags: AllFlags, ranks: Ranks) -> Report | None:
    """Run all benchmarks on all models; the report holds the tables. None in all processes but the first."""
    models = {label: _open(flags, model, ranks) for label, model in flags.labels()}
    if ranks.rank == 0:
        runs = (flags.flags_of(name, model) for _, model in flags.labels() for name in flags.names())
        check_judge(*(each for each in runs if isinstance(each, QaFlags)))
    metrics: dict[str, Metrics] = {}
    for label, model in flags.labels():
        found: dict[str, dict[str, str | float]] = {}
        for name, report in _reports(flags, model, models.pop(label), ranks):
            print(f"{label}: {name}\n{report.text}\n", flush=True)
            found |= report.metrics()
        metrics[label] = found
        if ranks.rank == 0:
            write_atomically(flags.folder(model) / "metrics.json", json.dumps(found, indent=1) + "\n")
    if ranks.rank:
        return None
    text = markdown(metrics)
    write_atomically(flags.output / "tables.md", text)
    write_atomically(flags.output / "tables.json", json.dumps(as_json(metrics), indent=1) + "\n")
    return Tables("all", text.rstrip("\n"), {}, next(iter(metrics.values())))


def _open(flags: AllFlags, path: Path, ranks: Ranks) -> Model:
    """A model whose weights are not loaded, after all questions, features and transcripts were looked up.

    A benchmark may have no transcript, but not all of them.
    """
    from pite.evaluate.answering import Model

    model = Model(path, flags.device, flags.batch_size, ranks, flags.family, flags.transcripts)
    every = (flags.flags_of(name, path) for name in flags.names())
    model.check_transcripts([find_inputs(each, model) for each in every if isinstance(each, AnswerFlags)])
    return model


def _reports(flags: AllFlags, path: Path, model: Model, ranks: Ranks) -> Iterator[tuple[Name, Report]]:
    """The report of each benchmark, in the first process."""
    for name in flags.names():
        each = flags.flags_of(name, path)
        if isinstance(each, TrajectoriesFlags):
            if not flags.benchmarks and "trajectory_projector" not in model.config.choices.modules:
                continue
            report = score_trajectories(each, ranks, model)
        else:
            report = score_answers(each, ranks, model)
        if report is not None:
            yield name, report
