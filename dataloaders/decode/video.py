"""Decode frames with PyAV: one sequential decode per video, since seeking to each frame is 3 to 40 times slower.

Containers miscount their frames. So the count is taken from the packets, which needs no decoding, and checked while
decoding; where it was wrong, the video is decoded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter

from dataloaders.decode.clips import Clip
from dataloaders.decode.facts import Facts
from dataloaders.decode.orientation import Orientation, orientation, upright
from dataloaders.decode.packets import Packets, inside, open_container, read_packets, video_stream
from dataloaders.decode.readable import DecodeError, check_readable
from dataloaders.decode.sampling import Sampling, is_uneven, sampled_indices
from dataloaders.decode.thinned import PacketsMissing, decode_needed

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Probe:
    """Properties of a video, known before its frames are decoded.

    codec, pixel_format  FFmpeg's names, such as "h264" and "yuv420p"
    width, height        in pixels, before a rotation
    orientation          how its display matrix turns and mirrors the frames
    matrix, full_range   FFmpeg's number of the colour matrix (1: BT.709; 2: unspecified, treated as BT.601), and
                         whether black is 0 instead of 16
    coded                (width, height) as coded, with the part that is not shown
    interlaced           the first frame holds two fields
    packets              the frames of the clip and their times
    """

    codec: str
    pixel_format: str
    width: int
    height: int
    orientation: Orientation
    matrix: int
    full_range: bool
    coded: tuple[int, int]
    interlaced: bool
    packets: Packets

    @property
    def first(self) -> int:
        """Index of the clip's first frame, in display order over the whole file."""
        return self.packets.first

    @property
    def total(self) -> int:
        """Frames in the clip."""
        return self.packets.total

    @property
    def regular(self) -> bool:
        """Every packet is a shown frame with a time, so that all decoders count the same frames."""
        return self.packets.regular

    def indices(self, num_frames: int, sampling: Sampling = "index") -> np.ndarray:
        """Indices (N,) in the file of the frames that stand for the clip."""
        return self.first + sampled_indices(self.packets.times, self.packets.end, num_frames, sampling)

    def facts(self, num_frames: int) -> Facts:
        """What is reported of the file, for N frames."""
        return _facts(self.packets, self.packets.times, self.packets.end, num_frames)


def _facts(packets: Packets, times: np.ndarray, end: float, num_frames: int) -> Facts:
    return Facts(is_uneven(times, end, num_frames), packets.ends, packets.cut_before)


def probe(path: Path, clip: Clip = None) -> Probe:
    """Read every packet's header and decode the first frame. Raises DecodeError as `decode_video` does."""
    check_readable(path)
    try:
        packets = read_packets(path, clip)
        with open_container(path) as container:
            stream = video_stream(container, path)
            frame = next(container.decode(stream), None)
            codec = stream.codec_context.codec.name
            coded = stream.codec_context.coded_width, stream.codec_context.coded_height
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
        orientation=orientation(frame),
        matrix=int(frame.colorspace),
        full_range=frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj"),
        coded=coded,
        interlaced=bool(frame.interlaced_frame),
        packets=packets,
    )


@dataclass(frozen=True)
class Sampled:
    """N frames of a video, and what is reported of its file.

    times     seconds at which each of them is shown; empty where packets and frames have no times
    duration  seconds at which the file's last frame ends; None without times
    """

    frames: list[np.ndarray]
    facts: Facts = field(default_factory=Facts)
    times: tuple[float, ...] = ()
    duration: float | None = None


def decode_video(
    path: Path, num_frames: int, clip: Clip = None, transform: Transform | None = None, sampling: Sampling = "index"
) -> np.ndarray:
    """N frames of a video, (N, H, W, 3) uint8 RGB, turned upright. As `sample_video`, for frames of one size."""
    try:
        return np.stack(sample_video(path, num_frames, clip, transform, sampling).frames)
    except DecodeError:
        raise
    except ValueError:
        raise DecodeError(f"{path}: its frames change size") from None


def sample_video(
    path: Path,
    num_frames: int,
    clip: Clip = None,
    transform: Transform | None = None,
    sampling: Sampling = "index",
    thinned: bool = True,
) -> Sampled:
    """N frames of a video, each (H, W, 3) uint8 RGB, turned upright.

    clip       (start, end) in seconds from the start of the file: only frames whose display starts in [start, end) count.
               A file that is as long as the clip, and ends before it, is the clip itself (`clips.clip_in`)
    transform  applied to each chosen frame (H, W, 3) as it is decoded, so that only its results are kept in memory
    sampling   the rule for the N frames. Files whose packets have no times are sampled by index
    thinned    decode only the packets that these frames need, where the headers prove which: the frames are the same
    Raises DecodeError for a file of which a needed packet cannot be decoded.
    """
    check_readable(path)
    try:
        packets = read_packets(path, clip)
        times, end = packets.times, packets.end
        frames: dict[int, np.ndarray] = {}
        if thinned and packets.thinnable and len(times):
            chosen = sampled_indices(times, end, num_frames, sampling)
            needed = _decode_needed(path, np.unique(chosen), transform, packets)
            if needed is not None:
                return _sampled(needed, packets, times, end, num_frames, sampling)
        seen = np.zeros(0)
        if packets.origin is not None:
            clip = packets.clip
            seen, frames = _decode(path, sampled_indices(times, end, num_frames, sampling), clip, transform, packets)
        if packets.origin is None or len(seen) != len(times):
            # The packets or the seek to the clip were wrong: count the frames by decoding from the start.
            times, end, seen, frames = _decode_twice(path, num_frames, clip, transform, sampling, packets)
    except av.EOFError:
        # FFmpeg reports a file that ends after its header in this way.
        times = np.zeros(0)
    except av.FFmpegError as error:
        raise DecodeError(f"{path}: {error.strerror}; is it a video?") from None
    if not len(times):
        raise DecodeError(_no_frame(path, clip))
    if len(seen) != len(times):
        raise DecodeError(f"{path}: gave {len(times)} frames when decoded once and {len(seen)} when decoded again")
    return _sampled(frames, packets, times, end, num_frames, sampling)


def _sampled(
    frames: dict[int, np.ndarray], packets: Packets, times: np.ndarray, end: float, num_frames: int, sampling: Sampling
) -> Sampled:
    """The chosen of the decoded frames, given the times of all frames and the end of the last."""
    chosen = sampled_indices(times, end, num_frames, sampling)
    sampled = Sampled([frames[i] for i in chosen.tolist()], _facts(packets, times, end, num_frames))
    if not end > 0 or np.isnan(times).any():
        return sampled
    return replace(sampled, times=tuple(times[chosen].tolist()), duration=end)


def _decode_twice(
    path: Path, num_frames: int, clip: Clip, transform: Transform | None, sampling: Sampling, packets: Packets
) -> tuple[np.ndarray, float, np.ndarray, dict[int, np.ndarray]]:
    """The times of the frames and their end, found by decoding; then those that a second decode finds, and its frames."""
    announced = packets.end
    packets = replace(packets, seekable=True, origin=None)
    times, _ = _decode(path, np.zeros(0, dtype=np.int64), clip, None, packets)
    end = max(float(times[-1] + np.median(np.diff(times))), announced) if len(times) > 1 else announced
    return times, end, *_decode(path, sampled_indices(times, end, num_frames, sampling), clip, transform, packets)


def _no_frame(path: Path, clip: Clip) -> str:
    return f"{path}: holds no frame" + ("" if clip is None else f" between {clip[0]:g} and {clip[1]:g} s")


def _decode_needed(
    path: Path, chosen: np.ndarray, transform: Transform | None, packets: Packets
) -> dict[int, np.ndarray] | None:
    """The frames at the `chosen` indices, from the packets that they need; None where the whole file must be decoded."""
    wanted = packets.ticks(chosen)
    index = dict(zip(wanted.tolist(), chosen.tolist()))
    reformatter, frames = VideoReformatter(), {}
    try:
        for frame in decode_needed(path, packets.pictures, wanted):
            place = index.get(cast("int", frame.pts))
            if place is None:
                continue
            if frame.is_corrupt:
                return None
            array = _upright_rgb(frame, reformatter)
            frames[place] = array if transform is None else transform(array)
    except (av.FFmpegError, PacketsMissing):
        return None  # Decoding all of it finds the reason.
    return frames if len(frames) == len(index) else None


def frames_at(path: Path, indices: np.ndarray, packets: Packets, transform: Transform) -> dict[int, np.ndarray]:
    """The frames with these indices in the clip of `packets`, by index. Raises DecodeError."""
    distinct = np.unique(indices)
    frames = _decode_needed(path, distinct, transform, packets) if packets.thinnable else None
    if frames is None:
        frames = _decode(path, distinct, packets.clip, transform, packets)[1]
    if len(frames) < len(distinct):
        raise DecodeError(f"{path}: gave {len(frames)} of {len(distinct)} frames")
    return frames


def _upright_rgb(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    return upright(reformatter.reformat(frame, format="rgb24").to_ndarray(), orientation(frame))


def _decode(
    path: Path, chosen: np.ndarray, clip: Clip, transform: Transform | None, packets: Packets
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Decode once: the time of each frame, NaN where unknown, and the frames at the `chosen` indices."""
    wanted = set(chosen.tolist())
    frames: dict[int, np.ndarray] = {}
    times = []
    for index, (time, array) in enumerate(_pictures(path, wanted, clip, packets)):
        times.append(time)
        if array is not None:
            frames[index] = array if transform is None else transform(array)
    return np.array(times), frames


def iter_frames(path: Path, wanted: Container[int]) -> Iterator[np.ndarray | None]:
    """Every frame of a video in order, (H, W, 3) uint8 RGB, turned upright; None for those whose index is not `wanted`.

    One at a time, for videos that do not fit in memory. Raises DecodeError, but not for a file that ends early: the
    caller must compare the number of frames with `probe`.
    """
    check_readable(path)
    try:
        for _, array in _pictures(path, wanted, None, Packets()):
            yield array
    except av.EOFError:
        raise DecodeError(_no_frame(path, None)) from None
    except av.FFmpegError as error:
        raise DecodeError(f"{path}: {error.strerror}; is it a video?") from None


def _pictures(
    path: Path, wanted: Container[int], clip: Clip, packets: Packets
) -> Iterator[tuple[float, np.ndarray | None]]:
    """The frames of a clip in order: their times, and as RGB where wanted."""
    # One for all frames: a new scaler costs more than decoding a small frame.
    reformatter = VideoReformatter()
    for index, (time, frame) in enumerate(_frames(path, clip, packets)):
        if index not in wanted:
            yield time, None
            continue
        if frame.is_corrupt:
            raise DecodeError(f"{path}: frame {index} is damaged")
        yield time, _upright_rgb(frame, reformatter)


def _frames(path: Path, clip: Clip, packets: Packets) -> Iterator[tuple[float, VideoFrame]]:
    """Decoded frames in display order with their times; those of a clip only.

    packets  with an origin, decoding starts at the clip's key frame, not at the first; if they are not seekable, the
             frames of the clip are counted from the first
    """
    with open_container(path) as container:
        stream = video_stream(container, path)
        unit, origin = stream.time_base, packets.origin
        decoded = 0
        try:
            if clip is not None and origin is not None and unit is not None and packets.seekable:
                container.seek(origin + int(clip[0] / unit), stream=stream, backward=True)
            for frame in container.decode(stream):
                decoded += 1
                if not packets.seekable:
                    if decoded > packets.first + packets.total:
                        return
                    if decoded > packets.first:
                        yield float("nan"), frame
                    continue
                if origin is None:
                    origin = _start(container.start_time, frame)
                seconds = float("nan")
                if frame.pts is not None and origin is not None and unit is not None:
                    seconds = float((frame.pts - origin) * unit)
                if clip is not None:
                    if seconds != seconds:
                        raise DecodeError(f"{path}: its frames carry no times, so no clip can be cut from it")
                    if seconds >= clip[1]:
                        return
                    if not inside(seconds, clip):
                        continue
                yield seconds, frame
        except av.FFmpegError as error:
            raise DecodeError(f"{path}: decoding failed after {decoded} frames: {error.strerror}") from None


def _start(start_time: int | None, first: VideoFrame) -> int | None:
    """Start of the container in the stream's units, given its first frame."""
    if first.pts is None or first.time_base is None or start_time is None:
        return first.pts
    return min(first.pts, round(start_time / av.time_base / first.time_base))
