"""The flags of dataloaders.transcripts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.files import folder_checksum
from dataloaders.formats.fields import VIDEO_SUFFIXES
from dataloaders.logs import LogFlags
from dataloaders.ranks import Part


@dataclass(frozen=True, kw_only=True)
class TranscriptFlags(LogFlags):
    """Write the transcript of each video of a folder: voice activity, speech to text, and a filter for sounds other than speech.

    A video that has a transcript is skipped, so a killed run continues with the same command.
    """

    videos: Path
    """folder of videos, or one video"""
    output: Path
    """folder for NAME.json of each video"""
    model: Path | None = None
    """folder of a Whisper in Hugging Face's format; PocketSphinx, far worse and English only, unless given"""
    tagger: Path | None = None
    """folder of a classifier of sounds with AudioSet's classes, such as an Audio Spectrogram Transformer: a segment in which
    it finds no speech, or much more music, is left out. Without it every segment with voice activity is kept"""
    threshold: float = 0.5
    """minimum probability of voice activity"""
    device: str = "cpu"
    """where the models run: cpu, cuda, or one GPU of several as cuda:1"""
    part: str | None = None
    """`2/3` transcribes the second of three parts of the videos, one for each process or host"""
    failure_budget: float = 0.01
    """share of videos that may fail"""

    def __post_init__(self) -> None:
        Part.parse(self.part)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"--device is cpu, cuda, or one GPU of several as cuda:1, not {self.device!r}")
        if self.device != "cpu" and self.model is None and self.tagger is None:
            raise ValueError(f"--device {self.device} is for --model or --tagger: PocketSphinx runs on the CPU")
        if not 0 < self.threshold < 1:
            raise ValueError(f"--threshold is a probability between 0 and 1, not {self.threshold}")
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"--failure-budget must be between 0 and 1, not {self.failure_budget}")

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        if not self.videos.is_dir():
            paths.input_file("--videos", self.videos)
        paths.input_folder("--model", self.model)
        paths.input_folder("--tagger", self.tagger)
        paths.output_folder("--output", self.output)
        if not self.files:
            raise ValueError(f"--videos {self.videos}: this folder holds no video ({', '.join(VIDEO_SUFFIXES)})")

    @property
    def files(self) -> list[Path]:
        """The video, or those of the folder by name, without hidden ones."""
        if not self.videos.is_dir():
            return [self.videos]
        files = (file for file in self.videos.iterdir() if not file.name.startswith("."))
        return sorted(file for file in files if file.suffix.lower() in VIDEO_SUFFIXES)

    def settings(self) -> dict[str, str | float | None]:
        """What the texts depend on: of the models, the name of the folder and a checksum of its files."""
        folders = {"model": self.model, "tagger": self.tagger}
        models = {
            name: None if path is None else f"{path.name} ({folder_checksum(path)})" for name, path in folders.items()
        }
        return {"threshold": self.threshold, **models}
