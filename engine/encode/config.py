"""The flags of engine.encode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dataloaders import paths
from dataloaders.cli import at_least, flag
from dataloaders.decode import TIME_LIMIT
from dataloaders.decode.sampling import Sampling
from dataloaders.formats import present_splits
from dataloaders.logs import LogFlags
from dataloaders.ranks import Part, check_one_host
from pite.families import Family, Name, family


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(LogFlags):
    """Decode and encode all media in the annotations of a data folder.

    A run resumes where the last one stopped. Files that cannot be decoded are listed in STORE/failures.*.jsonl, and the
    next run tries them again.
    """

    data: Path
    """data folder (layout: docs/data.md)"""
    store: Path
    """output folder for features: STORE/images and STORE/videos"""
    family: Name = "pite"
    """model family that the features are for: it chooses the frames, their resize and what is stored of them"""
    clip: str | None = flag(None, shown="the family's")
    """image tower in Hugging Face format, a folder or a name on the hub: CLIP, SigLIP or SigLIP 2 (docs/models.md); the
    family's own unless given"""
    num_frames: int = 100
    """frames per video"""
    sampling: Sampling | None = flag(None, shown="the family's")
    """rule that chooses a video's frames: evenly by their index, as PiTe published, by segments, as PG-Video-LLaVA did, or
    evenly in time, which differs for variable frame rates; a store holds features of one rule"""
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
    shard_records: int | None = flag(None, shown="the family's")
    """records per shard; a kill loses at most this many"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device of CLIP"""
    decoder: Literal["auto", "pyav", "dali", "torchcodec", "torchcodec-cuda"] = "auto"
    """decoder; auto is DALI if CLIP runs on a GPU and DALI is installed, else PyAV. Each file that DALI cannot decode
    falls back to PyAV. torchcodec decodes on the CPU, torchcodec-cuda on the GPU (not yet run on one)"""
    cpu_share: float | None = None
    """share of the videos that PyAV decodes on the CPU while DALI decodes the others on the GPU. By default estimated from
    the numbers of workers and NVDEC engines; STORE/decode.json keeps it for later runs"""
    part: str | None = None
    """`2/3` encodes the second of three parts of the media, of equal length: one for each host"""
    verify: int = 0
    """instead of encoding, decode and encode this many random records of the store again, and compare"""
    dry_run: bool = False
    """instead of encoding, print the store's size, the time to encode and the number of absent files; creates empty stores
    and the lists of media at most"""

    measured: Path = Path("bench/results")
    """folder with the results of bench.encode, from which --dry-run takes the rates of GPUs"""

    @property
    def choices(self) -> Family:
        """The choices of the family; those that a flag gives in place of its own."""
        own = family(self.family)
        return replace(
            own,
            clip=self.clip or own.clip,
            sampling=self.sampling or own.sampling,
            shard_records=self.shard_records or own.shard_records,
        )

    def check_paths(self) -> None:
        """Raise ValueError for a data folder without annotations, a store that is no folder, or a CLIP that cannot exist.

        Imports neither torch nor a decoder.
        """
        check_one_host("engine.encode")
        present_splits(self.data)
        paths.output_folder("--store", self.store)
        paths.model("--clip", self.choices.clip)

    def __post_init__(self) -> None:
        Part.parse(self.part)
        at_least(self, 1, "num_frames", "batch_size", "shard_records")
        at_least(self, 0, "workers")
        if self.verify < 0 or self.time_limit <= 0:
            raise ValueError("--verify must be 0 or more, and --time-limit more than 0")
        if self.cpu_share is not None and not 0 <= self.cpu_share <= 1:
            raise ValueError(f"--cpu-share is a share between 0 and 1, not {self.cpu_share}")
        if self.choices.sampling == "segments" and self.choices.extractor == "image_embeds":
            raise ValueError(
                f"--sampling segments gives fewer frames for short videos, and --family {self.family} takes {self.num_frames} of "
                "each: leave the flag out, or give --family pg-video-llava"
            )
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"--failure-budget is a share between 0 and 1, not {self.failure_budget}")
