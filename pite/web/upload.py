"""Checks a visitor's video, and makes it playable in a browser."""

from __future__ import annotations

from pathlib import Path

import av
from av.video.frame import VideoFrame

from dataloaders.decode.readable import DecodeError
from dataloaders.decode.video import Probe, probe
from dataloaders.errors import sentence

_PLAYABLE = {"h264", "vp8", "vp9", "av1", "libdav1d"}
_PLAYABLE_SUFFIXES = (".mp4", ".m4v", ".webm")
_WIDEST = 960


class RefusedVideo(ValueError):
    """A file that the page does not take. The message is one sentence without its path on the server."""


def accept(path: Path, max_seconds: float) -> Path:
    """The file to play: `path`, or a copy of it that a browser plays, written next to it.

    Raises RefusedVideo for a file that is no video, and for one that is longer than `max_seconds`.
    """
    try:
        found = probe(path)
        if found.packets.end > max_seconds:
            raise RefusedVideo(
                f"The video lasts {found.packets.end:.0f} s, and this page takes {max_seconds:.0f} s at most: "
                "upload a part of it."
            )
        return path if _playable(path, found) else _converted(path)
    except (DecodeError, av.FFmpegError) as error:
        reason = sentence(error).replace(str(path), path.name)
        raise RefusedVideo(f"This file is no video that can be shown ({reason}).") from None


def _playable(path: Path, found: Probe) -> bool:
    return (
        path.suffix.lower() in _PLAYABLE_SUFFIXES
        and found.codec in _PLAYABLE
        and found.pixel_format in ("yuv420p", "yuvj420p")
    )


def _converted(path: Path) -> Path:
    """An H.264 copy with the same times."""
    target = path.with_name(f"{path.name}.shown.mp4")
    if target.exists():
        return target
    with av.open(str(path.absolute()), metadata_errors="replace") as source, av.open(str(target), "w") as container:
        stream = None
        for frame in source.decode(video=0):
            if stream is None:
                stream = container.add_stream("libx264", rate=source.streams.video[0].average_rate or 25)
                scale = min(_WIDEST / frame.width, 1)
                stream.width, stream.height = (
                    max(int(side * scale) // 2 * 2, 2) for side in (frame.width, frame.height)
                )
                stream.pix_fmt, stream.time_base = "yuv420p", frame.time_base
                stream.options = {"crf": "23", "preset": "veryfast", "movflags": "+faststart"}
            container.mux(stream.encode(_scaled(frame, stream.width, stream.height)))
        if stream is not None:
            container.mux(stream.encode())
    return target


def _scaled(frame: VideoFrame, width: int, height: int) -> VideoFrame:
    scaled = frame.reformat(width=width, height=height, format="yuv420p")
    scaled.pts, scaled.time_base = frame.pts, frame.time_base
    return scaled
