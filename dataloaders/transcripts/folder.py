"""The transcripts of the videos of a benchmark, which the prompts of PG-Video-LLaVA quote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dataloaders.transcripts import read_transcript


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
        """Videos that have a file, and all of them. Raises ValueError if none has one."""
        names = set(videos)
        found = sum(self._file(name) is not None for name in names)
        if names and not found:
            raise ValueError(
                f"--transcripts {self._folder}: none of {len(names):,} videos has a file there, such as {min(names)}.json "
                "or .txt: check the names, or leave --transcripts out"
            )
        return found, len(names)

    def _file(self, video: str) -> Path | None:
        files = (self._folder / f"{video}{suffix}" for suffix in (".json", ".txt"))
        return next((file for file in files if file.is_file()), None)
