"""The flags of engine.encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataloaders.decode import TIME_LIMIT
from dataloaders.files import check_model_name
from dataloaders.formats import present_splits
from dataloaders.logs import LogLevel


@dataclass(frozen=True)
class EncodeConfig:
    """Decode and encode all media in the annotations of a data folder.

    A run resumes where the last one stopped. Files that cannot be decoded are listed in STORE/failures.*.jsonl, and the
    next run tries them again.
    """

    data: Path
    """data folder (layout: docs/data.md)"""
    store: Path
    """output folder for features: STORE/images and STORE/videos"""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP in Hugging Face format, a folder or a name on the hub"""
    num_frames: int = 100
    """frames per video"""
    batch_size: int = 200
    """frames per forward pass"""
    workers: int | None = None
    """decoding processes of each rank; 0 decodes in the rank's own process. By default one per core, or per two cores
    if CLIP runs on the CPU, divided among the ranks of a machine"""
    failure_budget: float = 0.01
    """share of media that may fail before the run stops; absent files are counted before anything is decoded"""
    time_limit: float = TIME_LIMIT
    """timeout in seconds: a file that takes longer fails and its process is killed (no timeout with 0 workers); a DALI
    batch that takes longer falls back to PyAV"""
    shard_records: int = 1024
    """records per shard; a kill loses at most this many"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device of CLIP"""
    decoder: Literal["auto", "pyav", "dali", "torchcodec"] = "auto"
    """decoder; auto is DALI if CLIP runs on a GPU and DALI is installed, else PyAV. Each file that DALI cannot decode
    falls back to PyAV"""
    verify: int = 0
    """instead of encoding, decode and encode this many random records of the store again, and compare"""
    dry_run: bool = False
    """instead of encoding, print the store's size, the time to encode and the number of absent files; creates empty stores
    and the lists of media at most"""

    log_level: LogLevel = "info"
    """least level of log messages to print; of several ranks, only rank 0 prints those below warnings"""

    def check_paths(self) -> None:
        """Raise ValueError for a data folder without annotations, a store that is no folder, or a CLIP that cannot exist.

        Imports neither torch nor a decoder.
        """
        present_splits(self.data)
        if self.store.exists() and not self.store.is_dir():
            raise ValueError(f"--store {self.store} is a file, not a folder")
        check_model_name(self.clip)

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
