"""Draws a grounded answer over the video: a box and a tinted mask for each object, with its phrase."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from dataloaders.annotation.steps import decode_mask
from dataloaders.annotation.tracking import Check, frames_until, go_on
from dataloaders.files import file_written_atomically
from pite.draw import COLORS
from pite.ground.grounding import Grounded, frames_every

_MOST_FPS, _WIDTH = 10, 960
"""Frames per second, and largest width, of the drawing."""
_CLOCK = Fraction(1, 90_000)
"""Unit of the drawing's times, in seconds."""
_TINT = 0.45


def save_overlay(path: Path, video: Path, grounded: Grounded, check: Check = go_on) -> None:
    """Write an H.264 MP4 of the span, with the frames' own times from its first on, atomically. Raises DecodeError.

    A mask is shown in the frame of its detection and up to the next one, moved with the box.
    """
    wanted = frames_every(grounded.times, grounded.span, 1 / _MOST_FPS)
    start, before = grounded.times[grounded.span[0]], -1
    width = min(grounded.size[0], _WIDTH) // 2 * 2
    height = round(grounded.size[1] * width / grounded.size[0]) // 2 * 2
    boxes = [each.boxes() for each in grounded.objects]
    with file_written_atomically(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_MOST_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = _CLOCK
        # With several threads the file would depend on their number.
        stream.options = {"crf": "20", "preset": "veryfast", "threads": "1"}
        for index, frame in frames_until(video, wanted, check):
            picture = av.VideoFrame.from_image(_drawn(frame, index, grounded, boxes).resize((width, height)))
            # The times of a damaged file may be equal, and an encoder takes none twice.
            before = max(before + 1, round((grounded.times[index] - start) / _CLOCK))
            picture.pts, picture.time_base = before, _CLOCK
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _drawn(frame: np.ndarray, index: int, grounded: Grounded, boxes: list[dict[int, np.ndarray]]) -> Image.Image:
    tinted = frame.astype(np.float32)
    for number, each in enumerate(grounded.objects):
        at = max((f for f in each.found if f <= index), default=None)
        if at is not None and index in boxes[number] and (mask := each.found[at].mask) is not None:
            moved = _moved(decode_mask(mask, f"frame {at}"), boxes[number][index] - boxes[number][at])
            tinted[moved] = (1 - _TINT) * tinted[moved] + _TINT * np.array(COLORS[number % len(COLORS)])
    picture = Image.fromarray(tinted.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    names = {number: phrase.text for phrase, own in reversed(grounded.phrases) for number in own}
    for number, own in enumerate(boxes):
        if index in own:
            color = COLORS[number % len(COLORS)]
            left, top, right, bottom = own[index].tolist()
            draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=color, width=3)
            draw.text((left + 4, max(top - 16, 0)), names[number], fill=color, font_size=14)
    return picture


def _moved(mask: np.ndarray, by: np.ndarray) -> np.ndarray:
    """A mask (H, W) moved like the middle of a box whose sides move `by` (4,); what leaves the frame is lost."""
    right, down = (round(float(by[i] + by[i + 2]) / 2) for i in (0, 1))
    height, width = mask.shape
    moved = np.zeros_like(mask)
    rows, columns = max(0, height - abs(down)), max(0, width - abs(right))
    top, left = max(0, -down), max(0, -right)
    kept = mask[top : top + rows, left : left + columns]
    moved[max(0, down) :, max(0, right) :][:rows, :columns] = kept
    return moved
