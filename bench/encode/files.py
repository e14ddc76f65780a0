"""The videos that are decoded: as the web has them, of several lengths; or those of a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bench.encode.settings import Settings
from bench.media import RATE, write_video

SECONDS = (10, 22, 52, 120)
"""Lengths of the files that are written; a kind has all of them in turn, and their mean is that of PiTe-143k."""

MIXED = ("H.264-360p", "H.264-720p", "H.264-544", "H.264-536", "H.264-480p", "HEVC-360p", "H.264-360p", "VP9-360p")
SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")


@dataclass(frozen=True)
class Files:
    """Videos of one kind, and the number of their frames."""

    kind: str
    paths: tuple[Path, ...]
    frames: int


def videos(settings: Settings) -> list[Files]:
    """The files of all kinds; those of `settings.files` are one kind."""
    if settings.files is not None:
        paths = tuple(sorted(path for path in settings.files.iterdir() if path.suffix.lower() in SUFFIXES))
        if not paths:
            raise ValueError(f"{settings.files} holds no video")
        return [Files(settings.files.name, paths, sum(map(count, paths)))]
    return [_written(settings, kind) for kind in settings.kinds]


def _written(settings: Settings, kind: str) -> Files:
    kinds = MIXED if kind == "mixed" else (kind,)
    paths = []
    for i in range(settings.number):
        seconds = SECONDS[i % len(SECONDS)] if settings.device == "cuda" else 2
        original = _one(settings.folder, kinds[i // len(SECONDS) % len(kinds)], seconds)
        link = settings.folder / kind / f"{i}{original.suffix}"
        link.parent.mkdir(exist_ok=True)
        os.link(original, link)
        paths.append(link)
    return Files(kind, tuple(paths), sum(map(count, paths)))


@lru_cache
def _one(folder: Path, kind: str, seconds: int) -> Path:
    codec, _, size = kind.partition("-")
    return write_video(folder / f"{kind}-{seconds}", codec, size, seconds * RATE)


def count(path: Path) -> int:
    """Number of frames of a video, by its packets."""
    from dataloaders.decode.packets import read_packets

    return read_packets(path, None).total
