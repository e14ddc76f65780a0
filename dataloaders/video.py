"""Frames out of files: one sequential decode per video, since seeking per frame is 3 to 40 times slower.

Containers miscount their frames, so the count is taken from the packets, which costs no decoding, and checked while
decoding; where even that was wrong the video is decoded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from dataloaders.containers import truncation

CLIP_TOLERANCE = 1.0
"""Seconds by which a clip may outlast its file: lengths are rounded, and audio often outlasts the pictures."""

Clip = tuple[float, float] | None
Transform = Callable[[np.ndarray], np.ndarray]


class DecodeError(ValueError):
    """A file that gives no frames: the message names it and says why."""


def frame_indices(total: int, num_frames: int) -> np.ndarray:
    """linspace(0, total - 1, N) truncated: (N,) int64, the published sampling rule. Short videos repeat frames."""
    return np.linspace(0, total - 1, num_frames, dtype=np.int64)


def decode_video(path: Path, num_frames: int, split: Clip = None, transform: Transform | None = None) -> np.ndarray:
    """N frames of a video, (N, H, W, 3) uint8 RGB, turned upright.

    split      (start, end) in seconds from the first frame: only frames shown in [start, end) count
    transform  applied to each chosen frame (H, W, 3) as it is decoded, so that only its results are kept in memory
    Raises DecodeError for whatever cannot be decoded whole.
    """
    _check_readable(path)
    try:
        total, origin = _count_packets(path, split)
        seen = -1
        frames: dict[int, np.ndarray] = {}
        if origin is not None:
            seen, frames = _decode(path, _indices(total, num_frames), split, transform, origin)
        if seen != total:
            # Packets or the jump to the clip were wrong: believe what a decode from the start gives.
            total, _ = _decode(path, _indices(0, num_frames), split, None, None)
            seen, frames = _decode(path, _indices(total, num_frames), split, transform, None)
    except av.EOFError:
        # FFmpeg's word for a header that is followed by nothing.
        total = 0
    except av.FFmpegError as error:
        raise DecodeError(f"{path}: {error.strerror}; is it a video?") from None
    if not total:
        span = "" if split is None else f" between {split[0]:g} and {split[1]:g} s"
        raise DecodeError(f"{path}: holds no frame{span}")
    if seen != total:
        raise DecodeError(f"{path}: gave {total} frames when decoded once and {seen} when decoded again")
    try:
        return np.stack([frames[i] for i in _indices(total, num_frames).tolist()])
    except ValueError:
        raise DecodeError(f"{path}: its frames change size") from None


def decode_image(path: Path) -> np.ndarray:
    """A still image, (H, W, 3) uint8 RGB, turned upright. Raises DecodeError."""
    _check_readable(path)
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise DecodeError(f"{path}: not an image that Pillow knows") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{path}: {error}") from None


def _check_readable(path: Path) -> None:
    try:
        if path.stat().st_size == 0:
            raise DecodeError(f"{path}: the file is empty")
        cut = truncation(path)
    except OSError as error:
        raise DecodeError(f"{path}: {error.strerror}") from None
    if cut:
        raise DecodeError(f"{path}: the file is cut off: {cut}")


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first video stream that is no cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            # Processes, not threads, share the work: one file per core has no idle waits.
            stream.codec_context.thread_count = 1
            return stream
    raise DecodeError(f"{path}: holds no video stream")


def _indices(total: int, num_frames: int) -> np.ndarray:
    return frame_indices(total, num_frames) if total else np.zeros(0, dtype=np.int64)


def _count_packets(path: Path, split: Clip) -> tuple[int, int | None]:
    """Frames to expect and the first one's display time in stream units; (0, None) where packets carry no times."""
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        times = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
        unit = stream.time_base
    pts = [t for t in times if t is not None]
    if len(pts) < len(times) or not pts or unit is None:
        return 0, None
    origin = min(pts)
    length = float((max(pts) - origin) * unit)
    if split is not None and split[1] > length + CLIP_TOLERANCE:
        raise DecodeError(f"{path}: its last frame stands at {length:.2f} s, before the clip's end at {split[1]:g} s")
    return sum(_inside(float((t - origin) * unit), split) for t in pts), origin


def _decode(
    path: Path, chosen: np.ndarray, split: Clip, transform: Transform | None, origin: int | None
) -> tuple[int, dict[int, np.ndarray]]:
    """Decode once: how many frames there are, and those at the `chosen` indices."""
    wanted = set(chosen.tolist())
    # One for all frames: making its scaler anew costs more than decoding a small frame.
    reformatter = VideoReformatter()
    frames: dict[int, np.ndarray] = {}
    seen = 0
    for frame in _frames(path, split, origin):
        if seen in wanted:
            if frame.is_corrupt:
                raise DecodeError(f"{path}: frame {seen} is damaged")
            array = _upright(reformatter.reformat(frame, format="rgb24"), frame.rotation)
            frames[seen] = array if transform is None else transform(array)
        seen += 1
    return seen, frames


def _frames(path: Path, split: Clip, origin: int | None) -> Iterator[VideoFrame]:
    """Decoded frames in display order; those of a clip only.

    origin  display time of the file's first frame: with it, decoding starts at the clip's key frame instead of there
    """
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        unit = stream.time_base
        decoded = 0
        try:
            if split is not None and origin is not None and unit is not None:
                container.seek(origin + int(split[0] / unit), stream=stream, backward=True)
            for frame in container.decode(stream):
                decoded += 1
                if split is not None:
                    if frame.pts is None or unit is None:
                        raise DecodeError(f"{path}: its frames carry no times, so no clip can be cut from it")
                    origin = frame.pts if origin is None else origin
                    seconds = float((frame.pts - origin) * unit)
                    if seconds >= split[1]:
                        return
                    if not _inside(seconds, split):
                        continue
                yield frame
        except av.FFmpegError as error:
            raise DecodeError(f"{path}: decoding failed after {decoded} frames: {error.strerror}") from None


def _inside(seconds: float, split: Clip) -> bool:
    return split is None or split[0] <= seconds < split[1]


def _upright(frame: VideoFrame, degrees: int) -> np.ndarray:
    """An RGB frame (H, W, 3), turned counter-clockwise as its display matrix says."""
    array = frame.to_ndarray()
    quarter_turns = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(array, quarter_turns)) if quarter_turns else array
