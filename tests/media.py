"""Small media files for tests: videos whose frames encode their own index, audio files and truncated files."""

from __future__ import annotations

from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

SIZE = (64, 48)

TWO_PASS = Path(__file__).parent / "dataloaders/decode/two_pass.webm"
"""Ordinary two-pass VP9, 40 frames of `bench.frame_cases.picture` at 10 per second, 192 x 144, of which
five packets also hold a hidden picture. ffmpeg's command line wrote it (`-c:v libvpx-vp9 -b:v 24k -pass 1`, then 2), because
PyAV has no second pass."""

needs_dali = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None,
    reason="DALI is not installed: pip install nvidia-dali-cuda130",
)


def grey(index: int) -> int:
    """The grey level of frame `index` of a test video; levels differ enough to survive compression."""
    return index * 4 % 252


def which_frame(frame: np.ndarray) -> int:
    """The index of a test video's frame, from the grey level of its center; valid for the first 60 frames."""
    height, width = frame.shape[:2]
    return round(float(frame[height // 3 : height // 2, width // 3 : width // 2].mean()) / 4)


def write_video(
    path: Path,
    num_frames: int,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = SIZE,
    rate: int = 10,
    rotation: int = 0,
    times: list[int] | None = None,
    gop: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a video of `num_frames` grey frames with a white top left corner.

    times  display time of each frame in milliseconds, for a variable frame rate
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        container.start_encoding()
        for i in range(num_frames):
            image = np.full((size[1], size[0], 3), grey(i), dtype=np.uint8)
            image[: size[1] // 4, : size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if num_frames:
            container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """Write an MP4 with audio and without video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    return path


def truncate(path: Path, to: Path, share: float) -> Path:
    """Write the first part of a file; `share` is its fraction."""
    content = path.read_bytes()
    to.write_bytes(content[: int(len(content) * share)])
    return to
