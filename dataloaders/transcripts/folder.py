"""A folder of videos' transcripts, which the prompts of PG-Video-LLaVA quote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dataloaders.files import sha256
from dataloaders.transcripts.files import read_transcript

_SUFFIXES = (".json", ".txt")


class Transcripts:
    """Files of a folder, each read once: VIDEO.json as `dataloaders.transcripts` writes it, else VIDEO.txt."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._texts: dict[str, str | None] = {}

    def text(self, video: str) -> str | None:
        """The transcript of a video; None without a file, and for an empty one. Raises ValueError for a damaged file."""
        if video not in self._texts:
            file = self._file(video)
            self._texts[video] = None if file is None else read_transcript(file)
        return self._texts[video]

    def count(self, videos: Iterable[str]) -> tuple[int, int]:
        """Videos that have a file, and all of them."""
        names = set(videos)
        return sum(self._file(name) is not None for name in names), len(names)

    def check(self, videos: Iterable[str]) -> None:
        """Raise ValueError if none of the videos has a file."""
        names = set(videos)
        if names and not self.count(names)[0]:
            raise ValueError(
                f"--transcripts {self._folder}: none of {len(names):,} videos has a file there, such as {min(names)}.json "
                "or .txt: check the names, or leave --transcripts out"
            )

    def checksum(self) -> str:
        """16 hexadecimal digits: a checksum of the files of transcripts in the folder, whatever else it holds."""
        files = (each for each in self._folder.iterdir() if each.suffix in _SUFFIXES and not each.name.startswith("."))
        sums = [(file.name, sha256(file)) for file in sorted(files) if file.is_file()]
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]

    def _file(self, video: str) -> Path | None:
        files = (self._folder / f"{video}{suffix}" for suffix in _SUFFIXES)
        return next((file for file in files if file.is_file()), None)
