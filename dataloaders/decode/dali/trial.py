"""Decode a small file before the first of the run: whether a pipeline works here must not be guessed from the run's own files.

Eight damaged files at the start of a run would look like a machine without NVDEC, and which files come first depends on the
ranks and on what is stored already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import av
from av.video.stream import VideoStream
from PIL import Image

from dataloaders.decode.dali.request import DecodeRequest
from dataloaders.records import Media

SIZE = (192, 144)
"""(width, height) that every NVDEC accepts, for each codec."""


class Decodes(Protocol):
    """A pipeline of DALI, or what takes its place."""

    def start(self, requests: Sequence[DecodeRequest]) -> None: ...

    def finish(self, requests: Sequence[DecodeRequest], seconds: float | None) -> Sequence[Any]: ...


def check(
    pipeline: Decodes,
    kind: Literal["video", "image"],
    device: str,
    prepare: Callable[[Media], object],
    seconds: float | None,
) -> None:
    """Decode a file of this kind by a pipeline on "cpu" or "cuda". Raises RuntimeError with the reason where that fails."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / ("trial.jpg" if kind == "image" else "trial.mkv")
        if kind == "image":
            Image.new("RGB", SIZE).save(path)
        else:
            path.write_bytes(small_video(device))
        request = prepare(Media("trial", path, kind))
        assert isinstance(request, DecodeRequest), request
        pipeline.start([request])
        try:
            (frames,) = pipeline.finish([request], seconds)
        except TimeoutError as error:
            raise RuntimeError(str(error)) from None
    if isinstance(frames, str):
        raise RuntimeError(frames)


def small_video(device: str) -> bytes:
    """A file of one picture, of a codec that DALI decodes on "cpu" or "cuda"."""
    codec, pixels = ("libx264", "yuv420p") if device == "cuda" else ("mjpeg", "yuvj420p")
    content = BytesIO()
    with av.open(content, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=10)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = *SIZE, pixels
        container.mux(stream.encode(av.VideoFrame(*SIZE, pixels)))
        container.mux(stream.encode())
    return content.getvalue()
