"""The flags of engine.encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataloaders.decode.decoder import TIME_LIMIT


@dataclass(frozen=True)
class EncodeConfig:
    """Decode and encode all media that the annotations of a data folder name.

    Runs again where it was stopped. Files that cannot be decoded are listed in STORE/failures.*.jsonl and tried again
    by the next run.
    """

    data: Path
    """data folder (layout: docs/data.md)"""
    store: Path
    """where features go: STORE/images and STORE/videos"""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP in Hugging Face format, a folder or a name on the hub"""
    num_frames: int = 100
    """frames per video"""
    batch_size: int = 200
    """frames per forward pass"""
    workers: int | None = None
    """decoding processes of each rank, 0 to decode in the rank's own; none for one per core, or per two cores where CLIP
    runs on the CPU, shared by the ranks of a machine"""
    failure_budget: float = 0.01
    """share of media that may fail before the run stops"""
    time_limit: float = TIME_LIMIT
    """seconds after which a file that is still being decoded is given up and its process killed (not kept by 0 workers), and
    a batch that DALI gives nothing of goes to PyAV"""
    shard_records: int = 1024
    """records per shard, the most that a kill can cost"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where CLIP runs"""
    decoder: Literal["auto", "pyav", "dali", "torchcodec"] = "auto"
    """what decodes; auto is DALI where CLIP runs on a GPU and DALI is installed, else PyAV. What DALI cannot decode goes to
    PyAV, file by file"""
    verify: int = 0
    """instead of encoding, decode and encode so many records of the store again, drawn at random, and compare"""
    dry_run: bool = False
    """instead of encoding, say how large the store will be and how long it will take; makes empty stores at most"""

    def __post_init__(self) -> None:
        for name in ("num_frames", "batch_size", "shard_records"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, not {self.workers}")
        if self.verify < 0 or self.time_limit <= 0:
            raise ValueError("--verify must be 0 or more, and --time-limit more than 0")
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"--failure-budget is a share between 0 and 1, not {self.failure_budget}")
