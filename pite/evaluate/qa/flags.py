"""The flags of `pite.evaluate qa`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import at_least
from pite.evaluate.flags import EvaluationFlags
from pite.evaluate.protocols import Protocol
from pite.evaluate.qa.benchmarks import Benchmark


@dataclass(frozen=True, kw_only=True)
class QaFlags(EvaluationFlags):
    """What is the answer to this question about the video? Scores a file of predictions."""

    benchmark: Benchmark
    """msvd_qa, msrvtt_qa, activitynet_qa, tgif_qa or video_chatgpt; also the task in the prediction file"""
    predictions: Path
    """prediction file, JSON lines"""
    ground_truth: tuple[Path, ...]
    """the benchmark's published files; of activitynet_qa test_q.json test_a.json"""
    video_names: Path | None = None
    """MSVD's youtube_mapping.txt, if the videos have their names on YouTube"""
    protocol: Protocol = "strict"
    """strict: questions without an answer count as wrong; published: they are left out, and scores cut to whole numbers"""
    judge_model: str | None = None
    """the judge: a model at --judge-url, or without it a local directory of transformers; none gives exact matches only"""
    judge_url: str | None = None
    """OpenAI-compatible endpoint, such as http://localhost:8000/v1"""
    judge_key: str = "OPENAI_API_KEY"
    """name of the environment variable with the endpoint's key"""
    judge_cache: Path | None = None
    """file of the judge's replies, which a repeated run reads; PREDICTIONS.judge.jsonl unless given"""
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
        if self.judge_model is None and self.benchmark == "video_chatgpt":
            raise ValueError("video_chatgpt is scored by a judge: give --judge-model, and --judge-url or a directory")

    @property
    def cache(self) -> Path:
        """The file of the judge's replies."""
        return self.judge_cache or self.predictions.with_name(f"{self.predictions.stem}.judge.jsonl")

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        paths.input_file("--predictions", self.predictions)
        for path in self.ground_truth:
            paths.input_file("--ground-truth", path)
        paths.input_file("--video-names", self.video_names)
        paths.output_file("--metrics", self.metrics)
        if self.judge_model is not None:
            paths.output_file("--judge-cache", self.cache)
            if self.judge_url is None:
                paths.input_folder("--judge-model", Path(self.judge_model))
