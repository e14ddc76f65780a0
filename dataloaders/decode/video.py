"""Decode frames with PyAV: one sequential decode per video, since seeking to each frame is 3 to 40 times slower.

Containers miscount their frames. So the count is taken from the packets, which needs no decoding, and checked while
decoding; where it was wrong, the video is decoded once more.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from dataloaders.decode.containers import truncation

CLIP_TOLERANCE = 1.0
"""Seconds by which a clip may end after its file: lengths are rounded, and audio is often longer than the pictures."""

MAX_PIXELS = 8192 * 8192
"""Most pixels of a frame, twice those of 8K video. With a damaged header, FFmpeg could allocate terabytes."""

_VP8_SHOWN = 0x10
"""The bit of a VP8 packet's first byte that marks a frame as shown (RFC 6386, 9.1)."""

Clip = tuple[float, float] | None
Transform = Callable[[np.ndarray], np.ndarray]


class DecodeError(ValueError):
    """A file that gives no frames. The message starts with the file and gives the reason."""


@dataclass(frozen=True)
class Probe:
    """Properties of a video, known before its frames are decoded.

    codec, pixel_format  FFmpeg's names, such as "h264" and "yuv420p"
    width, height        in pixels, as coded: before a rotation
    rotation             degrees counter-clockwise in its display matrix
    matrix, full_range   FFmpeg's number of the colour matrix (1: BT.709; 2: unspecified, treated as BT.601), and
                         whether black is 0 instead of 16
    first, total         index of the clip's first frame, in display order over the whole file; frames in the clip
    regular              every packet is a shown frame with a time, so that all decoders count the same frames
    """

    codec: str
    pixel_format: str
    width: int
    height: int
    rotation: int
    matrix: int
    full_range: bool
    first: int
    total: int
    regular: bool


def probe(path: Path, clip: Clip = None) -> Probe:
    """Read every packet's header and decode the first frame. Raises DecodeError as `decode_video` does."""
    _check_readable(path)
    try:
        packets = _read_packets(path, clip)
        with _open(path) as container:
            stream = _video_stream(container, path)
            frame = next(container.decode(stream), None)
            codec = stream.codec_context.codec.name
    except av.EOFError:
        frame = None
    except av.FFmpegError as error:
        raise DecodeError(f"{path}: {error.strerror}; is it a video?") from None
    if frame is None or (packets.origin is not None and not packets.total):
        raise DecodeError(_no_frame(path, clip))
    return Probe(
        codec=codec,
        pixel_format=frame.format.name,
        width=frame.width,
        height=frame.height,
        rotation=frame.rotation,
        matrix=int(frame.colorspace),
        full_range=frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj"),
        first=packets.first,
        total=packets.total,
        regular=packets.origin is not None and packets.all_shown,
    )


def frame_indices(total: int, num_frames: int) -> np.ndarray:
    """linspace(0, total - 1, N) truncated: (N,) int64, the published sampling rule. Short videos repeat frames."""
    return np.linspace(0, total - 1, num_frames, dtype=np.int64)


def decode_video(path: Path, num_frames: int, clip: Clip = None, transform: Transform | None = None) -> np.ndarray:
    """N frames of a video, (N, H, W, 3) uint8 RGB, turned upright.

    clip       (start, end) in seconds from the first frame: only frames shown in [start, end) count
    transform  applied to each chosen frame (H, W, 3) as it is decoded, so that only its results are kept in memory
    Raises DecodeError for a file that cannot be decoded completely.
    """
    _check_readable(path)
    try:
        packets = _read_packets(path, clip)
        total, origin = packets.total, packets.origin
        seen = -1
        frames: dict[int, np.ndarray] = {}
        if origin is not None:
            seen, frames = _decode(path, _indices(total, num_frames), clip, transform, origin)
        if seen != total:
            # The packets or the seek to the clip were wrong: count the frames by decoding from the start.
            total, _ = _decode(path, _indices(0, num_frames), clip, None, None)
            seen, frames = _decode(path, _indices(total, num_frames), clip, transform, None)
    except av.EOFError:
        # FFmpeg reports a file that ends after its header in this way.
        total = 0
    except av.FFmpegError as error:
        raise DecodeError(f"{path}: {error.strerror}; is it a video?") from None
    if not total:
        raise DecodeError(_no_frame(path, clip))
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
        raise DecodeError(f"{path}: not an image that Pillow supports") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{path}: {error}") from None


def _no_frame(path: Path, clip: Clip) -> str:
    return f"{path}: holds no frame" + ("" if clip is None else f" between {clip[0]:g} and {clip[1]:g} s")


def _open(path: Path) -> InputContainer:
    # Titles and tags that are not valid text do not matter.
    return av.open(str(path), metadata_errors="replace")


def _check_readable(path: Path) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DecodeError(f"{path}: a pipe or a device, not a file; reading it may never end")
        if status.st_size == 0:
            raise DecodeError(f"{path}: the file is empty")
        cut = truncation(path)
    except OSError as error:
        raise DecodeError(f"{path}: {error.strerror}") from None
    if cut:
        raise DecodeError(f"{path}: the file is cut off: {cut}")


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first stream that is no cover picture. Raises DecodeError if there is none or its frames are too large."""
    if container.format.name.endswith("_pipe"):
        raise DecodeError(f"{path}: a still image ({container.format.name.removesuffix('_pipe')}), not a video")
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            # One thread per file, since many processes decode at once: no core waits for another.
            stream.codec_context.thread_count = 1
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                raise DecodeError(f"{path}: frames of {width} x {height} pixels are more than can be decoded")
            # The stream itself may contain larger frames than its container declares.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            return stream
    raise DecodeError(f"{path}: holds no video stream")


def _indices(total: int, num_frames: int) -> np.ndarray:
    return frame_indices(total, num_frames) if total else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class _Packets:
    """A clip according to the packets.

    first, total  frames before the clip, and frames in it
    origin        the file's first display time in stream units; None where packets have no times and nothing is known
    all_shown     every packet is a frame that is shown
    """

    first: int = 0
    total: int = 0
    origin: int | None = None
    all_shown: bool = False


def _read_packets(path: Path, clip: Clip) -> _Packets:
    with _open(path) as container:
        stream = _video_stream(container, path)
        hides = stream.codec_context.codec.name == "vp8"
        packets = [p for p in container.demux(stream) if p.size]
        shown = [p for p in packets if not (p.is_discard or (hides and not bytes(p)[0] & _VP8_SHOWN))]
        times, unit, announced = [p.pts for p in shown], stream.time_base, _announced(container, stream)
        last = max((p.pts + (p.duration or 0) for p in shown if p.pts is not None), default=0)
    pts = [t for t in times if t is not None]
    if len(pts) < len(times) or not pts or unit is None:
        return _Packets()
    origin = min(pts)
    seconds = sorted(float((t - origin) * unit) for t in pts)
    if announced is not None and float(max(last, last - origin) * unit) < announced - CLIP_TOLERANCE:
        raise DecodeError(f"{path}: its frames end at {seconds[-1]:.2f} s of {announced:.2f} s; the file is damaged")
    if clip is not None and clip[1] > seconds[-1] + CLIP_TOLERANCE:
        raise DecodeError(f"{path}: its last frame is at {seconds[-1]:.2f} s, before the clip's end at {clip[1]:g} s")
    before = 0 if clip is None else sum(t < clip[0] for t in seconds)
    return _Packets(before, sum(_inside(t, clip) for t in seconds), origin, len(shown) == len(packets))


def _announced(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds in the stream's header. A container's duration may be that of the audio; other formats estimate it."""
    if not {"mp4", "matroska"} & set(container.format.name.split(",")):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        return None


def _decode(
    path: Path, chosen: np.ndarray, clip: Clip, transform: Transform | None, origin: int | None
) -> tuple[int, dict[int, np.ndarray]]:
    """Decode once: the number of frames, and the frames at the `chosen` indices."""
    wanted = set(chosen.tolist())
    frames: dict[int, np.ndarray] = {}
    seen = 0
    for seen, array in enumerate(_pictures(path, wanted, clip, origin), 1):
        if array is not None:
            frames[seen - 1] = array if transform is None else transform(array)
    return seen, frames


def iter_frames(path: Path, wanted: Container[int]) -> Iterator[np.ndarray | None]:
    """Every frame of a video in order, (H, W, 3) uint8 RGB, turned upright; None for those whose index is not `wanted`.

    One at a time, for videos that do not fit in memory. Raises DecodeError, but not for a file that ends early: the
    caller must compare the number of frames with `probe`.
    """
    _check_readable(path)
    try:
        yield from _pictures(path, wanted, None, None)
    except av.EOFError:
        raise DecodeError(_no_frame(path, None)) from None
    except av.FFmpegError as error:
        raise DecodeError(f"{path}: {error.strerror}; is it a video?") from None


def _pictures(path: Path, wanted: Container[int], clip: Clip, origin: int | None) -> Iterator[np.ndarray | None]:
    """The frames of a clip in order, as RGB where wanted."""
    # One for all frames: a new scaler costs more than decoding a small frame.
    reformatter = VideoReformatter()
    for index, frame in enumerate(_frames(path, clip, origin)):
        if index not in wanted:
            yield None
            continue
        if frame.is_corrupt:
            raise DecodeError(f"{path}: frame {index} is damaged")
        yield _upright(reformatter.reformat(frame, format="rgb24"), frame.rotation)


def _frames(path: Path, clip: Clip, origin: int | None) -> Iterator[VideoFrame]:
    """Decoded frames in display order; those of a clip only.

    origin  display time of the file's first frame; with it, decoding starts at the clip's key frame, not at the first
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        unit = stream.time_base
        decoded = 0
        try:
            if clip is not None and origin is not None and unit is not None:
                container.seek(origin + int(clip[0] / unit), stream=stream, backward=True)
            for frame in container.decode(stream):
                decoded += 1
                if clip is not None:
                    if frame.pts is None or unit is None:
                        raise DecodeError(f"{path}: its frames carry no times, so no clip can be cut from it")
                    origin = frame.pts if origin is None else origin
                    seconds = float((frame.pts - origin) * unit)
                    if seconds >= clip[1]:
                        return
                    if not _inside(seconds, clip):
                        continue
                yield frame
        except av.FFmpegError as error:
            raise DecodeError(f"{path}: decoding failed after {decoded} frames: {error.strerror}") from None


def _inside(seconds: float, clip: Clip) -> bool:
    return clip is None or clip[0] <= seconds < clip[1]


def _upright(frame: VideoFrame, degrees: int) -> np.ndarray:
    """An RGB frame (H, W, 3), turned counter-clockwise by its display matrix."""
    array = frame.to_ndarray()
    quarter_turns = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(array, quarter_turns)) if quarter_turns else array
