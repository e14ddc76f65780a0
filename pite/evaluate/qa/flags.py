"""The flags of `pite.evaluate qa`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dataloaders import paths
from dataloaders.cli import at_least
from pite.evaluate.flags import AnswerFlags, EvaluationFlags
from pite.evaluate.inputs import SPLIT
from pite.evaluate.qa.benchmarks import FILES, Benchmark


@dataclass(frozen=True, kw_only=True)
class JudgeFlags(EvaluationFlags):
    """The judge of video question answering."""

    judge_model: str | None = None
    """the judge: a model at --judge-url, or without it a local directory of transformers; none gives exact matches only"""
    judge_url: str | None = None
    """OpenAI-compatible endpoint, such as http://localhost:8000/v1"""
    judge_key: str = "OPENAI_API_KEY"
    """name of the environment variable with the endpoint's key"""
    price_per_million: tuple[float, float] | None = None
    """prices of a million tokens in prompts and in replies, for the estimate before the first call"""
    concurrency: int = 8
    """requests at a time"""
    retries: int = 5
    """further attempts of a request that failed"""
    timeout: int = 60
    """seconds that an attempt may take"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "concurrency", "timeout")
        at_least(self, 0, "retries")
        if self.judge_url is not None and self.judge_model is None:
            raise ValueError("--judge-url needs --judge-model, the model's name at the endpoint")
        if self.judge_url is not None and not self.judge_url.startswith(("http://", "https://")):
            raise ValueError(f"--judge-url must start with http:// or https://, not {self.judge_url!r}")

    def check_paths(self) -> None:
        super().check_paths()
        if self.judge_model is not None and self.judge_url is None:
            paths.input_folder("--judge-model", Path(self.judge_model))


@dataclass(frozen=True, kw_only=True)
class QaFlags(AnswerFlags, JudgeFlags):
    """What is the answer to this question about the video? Scores a file of predictions, or a model.

    --ground-truth takes the benchmark's published files; of activitynet_qa test_q.json test_a.json. With --model they are
    in DATA/evaluation/ unless given. With --protocol strict, questions without an answer count as wrong; with
    published they are left out, and scores are cut to whole numbers.
    """

    NAME: ClassVar[str] = "qa"

    benchmark: Benchmark
    """msvd_qa, msrvtt_qa, activitynet_qa, tgif_qa or video_chatgpt; also the task in the prediction file"""
    video_names: Path | None = None
    """MSVD's youtube_mapping.txt, if the videos have their names on YouTube"""
    judge_cache: Path | None = None
    """file of the judge's replies, which a repeated run reads; PREDICTIONS.judge.jsonl unless given"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judge_model is not None and self.predictions is None and self.judge_cache is None:
            raise ValueError("--judge-model needs --predictions or --judge-cache, so that its replies are kept")
        if self.judge_model is None and self.benchmark == "video_chatgpt":
            raise ValueError("video_chatgpt is scored by a judge: give --judge-model, and --judge-url or a directory")

    @property
    def cache(self) -> Path:
        """The file of the judge's replies."""
        if self.judge_cache is not None:
            return self.judge_cache
        assert self.predictions is not None, "__post_init__ requires one of the two"
        return self.predictions.with_name(f"{self.predictions.stem}.judge.jsonl")

    @property
    def truth(self) -> tuple[Path, ...]:
        """The files of the ground truth."""
        if self.ground_truth:
            return self.ground_truth
        assert self.data is not None, "__post_init__ requires one of the two"
        return tuple(self.data / SPLIT / name for name in FILES[self.benchmark])

    def outputs(self) -> dict[str, Path | None]:
        return super().outputs() | ({} if self.judge_model is None else {"--judge-cache": self.cache})

    def inputs(self) -> dict[str, Path | None]:
        return super().inputs() | {"--video-names": self.video_names}

    def check_paths(self) -> None:
        super().check_paths()
        paths.input_file("--video-names", self.video_names)
