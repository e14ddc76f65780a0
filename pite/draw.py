"""Draws trajectories over the frames: a strip of frames as PNG, or every frame as MP4.

A predicted track is a filled dot with a tail, in its object's colour. A true track is a white ring with a thin white
tail. Both have a dark edge, to be visible on any picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataloaders.records import ABSENT

COLORS = ((255, 176, 0), (64, 196, 255), (236, 64, 122), (124, 222, 98), (171, 130, 255), (255, 112, 67))
Frames = Sequence[np.ndarray] | np.ndarray
_EDGE, _TRUE, _PAPER, _INK = (16, 18, 24), (255, 255, 255), (250, 250, 248), (32, 34, 40)
_OVERSAMPLE = 2
"""Drawings are made at twice the size and scaled down, because Pillow draws without anti-aliasing."""


@dataclass(frozen=True)
class Track:
    """One object's key points.

    label      the noun phrase
    predicted  (P, N, 2) fractions of the frame from the top left
    true       the same shape, (-1, -1) where absent; None if unknown
    span       first and last frame index to draw; if `true` is known, only its present points are drawn
    """

    label: str
    predicted: np.ndarray
    true: np.ndarray | None = None
    span: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the phrase, its frames (None: all), and `points` (P, N, 2) rounded to four digits."""
        return {"phrase": self.label, "frames": self.span, "points": self.predicted.round(4).tolist()}

    def shown(self) -> np.ndarray:
        """(P, N) boolean: which points are drawn."""
        points, frames, _ = self.predicted.shape
        first, last = self.span or (0, frames - 1)
        inside = (np.arange(frames) >= first) & (np.arange(frames) <= last)
        if self.true is None:
            return np.broadcast_to(inside, (points, frames))
        return inside & (self.true != ABSENT).any(-1)


def draw_frame(
    frame: np.ndarray, tracks: Sequence[Track], index: int, *, width: int = 320, tail: int = 8
) -> Image.Image:
    """Frame `index`, (H, W, 3) uint8, scaled to `width` pixels, with each track's point and tail."""
    height = round(width * frame.shape[0] / frame.shape[1])
    size = (width * _OVERSAMPLE, height * _OVERSAMPLE)
    picture = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    unit = max(width * _OVERSAMPLE // 160, 2)
    for track, color in zip(tracks, _cycle(len(tracks))):
        shown = track.shown()
        for point in range(track.predicted.shape[0]):
            if track.true is not None:
                _draw_point(draw, track.true[point], shown[point], index, tail, size, unit, _TRUE, ring=True)
            _draw_point(draw, track.predicted[point], shown[point], index, tail, size, unit, color, ring=False)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _draw_point(
    draw: ImageDraw.ImageDraw,
    positions: np.ndarray,
    shown: np.ndarray,
    index: int,
    tail: int,
    size: tuple[int, int],
    unit: int,
    color: tuple[int, int, int],
    *,
    ring: bool,
) -> None:
    if not shown[index]:
        return
    pixels = [tuple(pair) for pair in (positions * np.array(size)).tolist()]
    past = [i for i in range(max(index - tail, 0), index) if shown[i] and shown[i + 1]]
    thickness = unit if ring else unit * 2
    for fill, width in ((_EDGE, thickness + unit), (color, thickness)):
        for i in past:
            draw.line([pixels[i], pixels[i + 1]], fill=fill, width=width)
    if ring:
        draw.circle(pixels[index], 5 * unit, outline=_EDGE, width=3 * unit)
        draw.circle(pixels[index], 4.5 * unit, outline=color, width=unit)
    else:
        draw.circle(pixels[index], 3 * unit, fill=color, outline=_EDGE, width=unit)


def save_strip(
    path: Path, frames: Frames, tracks: Sequence[Track], *, columns: int = 6, title: str = "", width: int = 320
) -> None:
    """Write a PNG: `columns` frames, evenly spaced among the frames that show a track, with a title and a legend."""
    indices = _evenly_spaced(frames, tracks, columns)
    panels = _of_one_size([draw_frame(frames[i], tracks, i, width=width) for i in indices])
    gap, line = 12, 26
    heading = _wrap(title, _font(18), columns * (width + gap) - gap) if title else []
    top = gap + len(heading) * line
    legend = _legend(tracks, columns * (width + gap) - gap)
    height = top + line + panels[0].height + gap + legend.height + gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate(heading):
        draw.text((gap, gap + row * line), text, fill=_INK, font=_font(18))
    for column, (i, panel) in enumerate(zip(indices, panels)):
        left = gap + column * (width + gap)
        draw.text((left, top), f"frame {i} of {len(frames)}", fill=_INK, font=_font(15))
        sheet.paste(panel, (left, top + line))
    sheet.paste(legend, (gap, top + line + panels[0].height + gap))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def save_video(
    path: Path, frames: Iterable[np.ndarray], tracks: Sequence[Track], *, fps: float = 8.0, width: int = 480
) -> None:
    """Write an H.264 MP4 of all frames with their tracks and a legend below, at `fps` frames per second.

    Frames of another size than the first, (H, W, 3) uint8 each, are scaled to its size, also in a strip.
    """
    legend = _legend(tracks, width - 16)
    panels = _of_one_size([draw_frame(frame, tracks, i, width=width) for i, frame in enumerate(frames)])
    # yuv420p needs even width and height.
    size = (width + width % 2, (panels[0].height + legend.height + 17) // 2 * 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        for panel in panels:
            sheet = Image.new("RGB", size, _PAPER)
            sheet.paste(panel, (0, 0))
            sheet.paste(legend, (8, panel.height + 8))
            container.mux(stream.encode(av.VideoFrame.from_image(sheet)))
        container.mux(stream.encode())


def _of_one_size(panels: list[Image.Image]) -> list[Image.Image]:
    return [panel if panel.size == panels[0].size else panel.resize(panels[0].size) for panel in panels]


def _evenly_spaced(frames: Frames, tracks: Sequence[Track], columns: int) -> list[int]:
    shown = np.zeros(len(frames), dtype=bool)
    for track in tracks:
        shown |= track.shown().any(0)
    times = np.flatnonzero(shown) if shown.any() else np.arange(len(frames))
    return [int(times[round(i)]) for i in np.linspace(0, len(times) - 1, columns)]


def _legend(tracks: Sequence[Track], width: int) -> Image.Image:
    """One entry per object, filled from left to right in as many rows as they need."""
    font, row = _font(16), 26
    entries: list[tuple[str, tuple[int, int, int] | None]] = [
        (track.label, color) for track, color in zip(tracks, _cycle(len(tracks)))
    ]
    if any(track.true is not None for track in tracks):
        entries.append(("ring: true position", None))
    places: list[tuple[int, int]] = []
    x = y = 0
    for text, _ in entries:
        length = 24 + int(font.getlength(text)) + 24
        if x and x + length > width:
            x, y = 0, y + row
        places.append((x, y))
        x += length
    legend = Image.new("RGB", (width, y + row if entries else 1), _PAPER)
    draw = ImageDraw.Draw(legend)
    for (text, color), (x, y) in zip(entries, places):
        if color is None:
            draw.circle((x + 9, y + 12), 8, outline=_EDGE, width=4)
            draw.circle((x + 9, y + 12), 7, outline=_TRUE, width=2)
        else:
            draw.circle((x + 9, y + 12), 7, fill=color, outline=_EDGE, width=1)
        draw.text((x + 24, y + 2), text, fill=_INK, font=font)
    return legend


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width or not lines[-1]:
            lines[-1] = candidate
        else:
            lines.append(word)
    return lines


def _cycle(count: int) -> list[tuple[int, int, int]]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
