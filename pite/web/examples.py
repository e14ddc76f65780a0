"""Example videos of the page, with questions to click on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from dataloaders.decode.readable import DecodeError
from dataloaders.decode.video import iter_frames, probe
from dataloaders.formats.fields import VIDEO_SUFFIXES
from dataloaders.synthetic.language import TIMES_FIRST
from pite.evaluate.grounding import question_for, read_truth

MOST = 6
QUESTIONS = (TIMES_FIRST, "What happens in the video?")
"""For videos without questions of their own."""

_THUMBNAIL = 240


@dataclass(frozen=True)
class Example:
    """A video and questions about it."""

    path: Path
    questions: tuple[str, ...] = QUESTIONS


def of_folder(folder: Path) -> list[Example]:
    """The first videos of a folder, by name."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file())
    return [Example(file.resolve()) for file in files[:MOST]]


def of_demo(demo: Path, objects: int = 2) -> list[Example]:
    """Held-out videos of the demo with this many objects, with questions that the model was trained to answer."""
    captions = demo / "data" / "evaluation" / "activitynet_captions.json"
    truth = read_truth(captions)
    chosen = islice((video for video, events in truth.items() if len(events.intervals) == objects), MOST)
    return [
        Example(
            (captions.parent / "videos" / f"{video}.mp4").resolve(),
            (TIMES_FIRST, *map(question_for, truth[video].sentences)),
        )
        for video in chosen
    ]


def thumbnail(video: Path) -> Image.Image | None:
    """The frame in the middle; None for a video that cannot be decoded."""
    try:
        middle = probe(video).packets.total // 2
        frame = next((frame for frame in islice(iter_frames(video, {middle}), middle, None)), None)
    except DecodeError:
        return None
    if frame is None:
        return None
    picture = Image.fromarray(frame)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture
