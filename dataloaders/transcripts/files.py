"""The file of a video's transcript.

    {"video": "a.mp4", "bytes": 51234, "duration": 12.5, "language": "en", "transcript": "Hello there.",
     "segments": [{"start": 1.2, "end": 2.9, "text": "Hello there.", "kept": true, "tags": [["Speech", 2.1]]}]}

`transcript` joins the texts that are kept. A video without sound has no segments.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataloaders.files import write_atomically


@dataclass(frozen=True)
class Segment:
    """Text between two times, in seconds.

    kept  whether the sound is speech; a segment with music over it has text too, but often a wrong one
    tags  the most probable sounds and their logits, if a tagger was given
    """

    start: float
    end: float
    text: str
    kept: bool = True
    tags: tuple[tuple[str, float], ...] = ()


def write_transcript(path: Path, video: Path, duration: float, language: str | None, segments: list[Segment]) -> None:
    """Write the file of one video, atomically."""
    texts = [each.text for each in segments if each.kept and each.text]
    content = {
        "video": video.name,
        "bytes": video.stat().st_size,
        "duration": round(duration, 3),
        "language": language,
        "transcript": " ".join(texts),
        "segments": [asdict(each) for each in segments],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def is_transcribed(path: Path, video: Path) -> bool:
    """Whether `path` is the transcript of a video. Raises ValueError for that of another one, and for another file."""
    if not path.exists():
        return False
    found = _read_object(path)
    if (found.get("video"), found.get("bytes")) != (video.name, video.stat().st_size):
        raise ValueError(f"{path}: the transcript of another video than {video}: remove it, or give another --output")
    return True


def read_transcript(path: Path) -> str | None:
    """The text of a transcript's file, or of any other text file; None where it is empty.

    Raises ValueError for a .json that this package did not write, and for a text that is not UTF-8.
    """
    text = _read_object(path)["transcript"] if path.suffix.lower() == ".json" else _read_text(path)
    return text.strip() or None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("transcript"), str):
        raise ValueError(f"{path}: no transcript: expected an object with a field 'transcript', a text")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
