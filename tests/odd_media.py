"""Odd but legal media files for tests, as public bug reports describe them: each is a few kilobytes, made when needed.

The frames of videos are those of tests.media.write_video: frame i is grey(i), with a white top left corner.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from tests.media import SIZE, grey, write_video

MATRICES = {
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed, turned by 180": (0, -1, -1, 0),
    "turned clockwise": (0, 1, -1, 0),
}
"""Display matrices (a, b, c, d): a pixel at (x, y) is shown at (a x + c y, b x + d y)."""

CORNERS = {
    "mirrored": (0, -1),
    "upside down": (-1, 0),
    "transposed": (0, 0),
    "transposed, turned by 180": (-1, -1),
    "turned clockwise": (0, -1),
}
"""Where each matrix puts the top left corner of a frame."""

FINE = {"qmin": "1", "qmax": "2"}
"""Options by which MPEG-4 keeps each frame's grey level."""


@dataclass(frozen=True)
class Track:
    """A stream of `frames` pictures at 10 per second from `start` seconds. `offset` is the index of the first."""

    frames: int = 20
    start: float = 0.0
    size: tuple[int, int] = SIZE
    offset: int = 0
    codec: str = "mpeg4"
    default: bool | None = None


def picture(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The picture of frame `index`, (H, W, 3) uint8."""
    image = np.full((size[1], size[0], 3), grey(index), dtype=np.uint8)
    image[: size[1] // 4, : size[0] // 4] = 255
    return image


def write_tracks(path: Path, tracks: Sequence[Track], sound: float = 0.0, last: float = 0.1) -> Path:
    """Write several video streams, and silence of `sound` seconds from the start; the last frame is shown for `last`."""
    with av.open(str(path), "w") as container:
        silence = container.add_stream("aac", rate=8000) if sound else None
        streams = [container.add_stream(t.codec, rate=10, options=FINE) for t in tracks]
        for stream, track in zip(streams, tracks):
            stream.width, stream.height = track.size
            stream.pix_fmt = "yuvj420p" if track.codec == "mjpeg" else "yuv420p"
            if track.default is not None:
                stream.disposition = Disposition.default if track.default else Disposition(0)
        packets = []
        for stream, track in zip(streams, tracks):
            for i in range(track.frames):
                frame = av.VideoFrame.from_ndarray(picture(track.offset + i, track.size), format="rgb24")
                frame.pts, frame.time_base = i + round(10 * track.start), Fraction(1, 10)
                packets += stream.encode(frame)
            packets += stream.encode()
            packets[-1].duration = round(last / packets[-1].time_base)
        if silence is not None:
            for i in range(int(sound * 8000 / 1024)):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.rate, samples.pts, samples.time_base = 8000, i * 1024, Fraction(1, 8000)
                packets += silence.encode(samples)
            packets += silence.encode()
        for packet in sorted(packets, key=lambda p: (p.dts or 0) * p.time_base):
            container.mux(packet)
    return path


def write_matrix(path: Path, matrix: tuple[int, int, int, int], num_frames: int = 3, codec: str = "libx264") -> Path:
    """Write an MP4 with a display matrix in its track header (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(write_video(path, num_frames, codec=codec, size=(64, 64)).read_bytes())
    a, b, c, d = (65536 * value for value in matrix)
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def write_piped(path: Path) -> Path:
    """Write an AVI whose header has no lengths, as if written into a pipe."""
    content = bytearray(write_video(path, 20, codec="mpeg4", options=FINE).read_bytes())
    content[4:8] = b"\xff" * 4
    path.write_bytes(content)
    return path


def write_resized(path: Path) -> Path:
    """Write an MPEG transport stream whose frames change from 64 x 48 to 96 x 72 pixels after frame 9."""
    parts = []
    for number, size in enumerate([(64, 48), (96, 72)]):
        part = write_tracks(path.with_name(f"part{number}.ts"), [Track(10, float(number), size, 10 * number)])
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))
    return path


def write_grey16(path: Path) -> Path:
    """Write a 16-bit still that is black on the left and half white on the right."""
    levels = np.zeros((40, 60), np.uint16)
    levels[:, 30:] = 32768
    Image.fromarray(levels).save(
        path, path.suffix[1:].upper().replace("TIF", "TIFF") if path.suffix != ".jpg" else "PNG"
    )
    return path


def write_transparent(path: Path, mode: str = "RGBA") -> Path:
    """Write noise that is transparent on the left, half transparent in the middle, and opaque on the right."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    pixels[:, :20, 3], pixels[:, 20:40, 3], pixels[:, 40:, 3] = 0, 128, 255
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def write_long_webp(path: Path) -> Path:
    """Write a WebP whose header counts one byte more than the file has."""
    Image.fromarray(picture(20)).save(path, "WEBP")
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", len(content) - 7)
    path.write_bytes(content)
    return path


def write_heic(path: Path) -> Path:
    """Write the first bytes of a HEIC file."""
    path.write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + b"\x00\x00\x00\x20meta" + b"\x00" * 24)
    return path
