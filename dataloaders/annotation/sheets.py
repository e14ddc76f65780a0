"""Contact sheets of finished records: a row for each trajectory, with its key points in frames from start to end."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dataloaders.annotation.pipeline import Video
from dataloaders.annotation.steps import step_path
from dataloaders.annotation.tracking import count_frames
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.video import iter_frames
from dataloaders.files import file_written_atomically
from dataloaders.records import ABSENT

log = logging.getLogger(__name__)

FOLDER = "sheets"
COLUMNS, ROWS, WIDTH, TITLE = 6, 8, 240, 14
"""Frames of a row, most rows of a sheet, width of a frame and height of a row's title, in pixels."""

_COLOURS = ("red", "yellow", "cyan", "magenta", "lime", "orange")


def draw_sheets(videos: Sequence[Video], work: Path, most: int) -> None:
    """Draw up to `most` sheets of videos with trajectories, evenly spaced over the set; existing ones are kept."""
    made = [v for v in videos if step_path(work, "records", v.name).exists()]
    chosen = made[:: max(1, -(-len(made) // most))] if most else []
    for video in chosen:
        path = work / FOLDER / f"{video.name}.png"
        record = json.loads(step_path(work, "records", video.name).read_bytes())["record"]
        if path.exists() or not record["trajectories"]:
            continue
        try:
            sheet = draw(video, record["trajectories"][:ROWS])
        except DecodeError as error:
            log.warning("no contact sheet: %s", error)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_written_atomically(path) as temporary:
            sheet.save(temporary, format="PNG")
    if chosen:
        print(f"contact sheets of {len(chosen):,} videos: {work / FOLDER}")


def draw(video: Video, trajectories: Sequence[dict[str, Any]]) -> Image.Image:
    """A sheet of trajectories in the form of a record. Raises DecodeError."""
    first, total = count_frames(video.path, video.media.clip)
    shown = [_moments(each, first, total, video.captions.duration) for each in trajectories]
    frames = _frames(video.path, {frame for row in shown for frame, _ in row})
    height = next(iter(frames.values())).height + TITLE
    sheet = Image.new("RGB", (COLUMNS * WIDTH, len(shown) * height), "white")
    write = ImageDraw.Draw(sheet)
    for i, (trajectory, row) in enumerate(zip(trajectories, shown)):
        start, end = trajectory["times"]
        title = f"{trajectory['phrase']}, {start:.1f} to {end:.1f} s"
        write.text((4, i * height + 1), title.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, (frame, points) in enumerate(row):
            picture = frames[frame].copy()
            _mark(picture, points)
            sheet.paste(picture, (column * WIDTH, i * height + TITLE))
    return sheet


def _moments(trajectory: dict[str, Any], first: int, total: int, duration: float) -> list[tuple[int, np.ndarray]]:
    """Frames of a row, and the key points (P, 2) in each."""
    points = np.array(trajectory["points"], float)
    chosen = np.unique(np.linspace(0, points.shape[1] - 1, COLUMNS).round().astype(int))
    start, end = trajectory["times"]
    times = np.linspace(start, end, points.shape[1])
    return [
        (first + min(max(round(times[k] / duration * (total - 1)), 0), total - 1), points[:, k])
        for k in chosen.tolist()
    ]


def _frames(path: Path, wanted: set[int]) -> dict[int, Image.Image]:
    frames: dict[int, Image.Image] = {}
    last = max(wanted)
    for index, frame in enumerate(iter_frames(path, wanted)):
        if frame is not None:
            height = round(WIDTH / frame.shape[1] * frame.shape[0])
            frames[index] = Image.fromarray(frame).resize((WIDTH, height), Image.Resampling.BILINEAR)
        if index == last:
            return frames
    raise DecodeError(f"{path}: ends before frame {last}, which its packets promise")


def _mark(picture: Image.Image, points: np.ndarray) -> None:
    draw = ImageDraw.Draw(picture)
    for number, (x, y) in enumerate(points):
        if (x, y) != (ABSENT, ABSENT):
            left, top = x * picture.width, y * picture.height
            draw.ellipse((left - 3, top - 3, left + 3, top + 3), fill=_COLOURS[number % len(_COLOURS)], outline="black")
