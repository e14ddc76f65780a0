"""The video stream of a container and the times of its frames, from the packets' headers: nothing is decoded."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from dataloaders.decode.bitstream.pictures import Pictures, read_pictures
from dataloaders.decode.clips import CLIP_TOLERANCE, Clip, clip_in
from dataloaders.decode.containers import duration, is_avif
from dataloaders.decode.readable import MAX_PIXELS, DecodeError

_VP8_SHOWN = 0x10
"""The bit of a VP8 packet's first byte that marks a frame as shown (RFC 6386, 9.1)."""

_INDEXED = {"mp4", "matroska"}


def open_container(path: Path) -> InputContainer:
    """Open a file. An absolute path, because FFmpeg takes `a:b.mp4` for an address."""
    # Titles and tags that are not valid text do not matter.
    return av.open(str(path.absolute()), metadata_errors="replace")


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The stream that players show: the default one, else the longest, without cover pictures.

    Raises DecodeError if there is none or its frames are too large.
    """
    if container.format.name.endswith("_pipe"):
        raise DecodeError(f"{path}: a still image ({container.format.name.removesuffix('_pipe')}), not a video")
    if is_avif(path):
        raise DecodeError(f"{path}: a still image (avif or heic), not a video")
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise DecodeError(f"{path}: holds no video stream")
    stream = streams[0]
    if len(streams) > 1:
        status = path.stat()
        chosen = _main_stream(str(path.absolute()), status.st_size, status.st_mtime_ns)
        stream = next(s for s in streams if s.index == chosen)
    # One thread per file, since many processes decode at once: no core waits for another.
    stream.codec_context.thread_count = 1
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{path}: frames of {width} x {height} pixels are more than can be decoded")
    # The stream itself may contain larger frames than its container declares.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


@lru_cache(64)
def _main_stream(path: str, size: int, changed: int) -> int:
    """Index of the main one of several video streams: one of a single picture comes last, a default one first.

    Reads all packets, since headers lack the lengths of streams. `size` and `changed` identify the file's content.
    """
    with open_container(Path(path)) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        times: dict[int, list[float]] = defaultdict(list)
        for packet in container.demux(streams):
            time = packet.pts if packet.pts is not None else packet.dts
            if packet.size and time is not None and packet.time_base is not None:
                times[packet.stream_index].append(float(time * packet.time_base))

        def rank(stream: VideoStream) -> tuple[bool, bool, float, int, int]:
            known = times[stream.index]
            pixels = stream.codec_context.width * stream.codec_context.height
            default = bool(stream.disposition & Disposition.default)
            # Rounded, so that streams of one length are compared by their pictures' size.
            lasts = round(max(known) - min(known)) if known else 0
            return len(known) > 1, default, lasts, pixels, -stream.index

        return max(streams, key=rank).index


@dataclass(frozen=True)
class Packets:
    """The frames of a clip, according to the packets.

    first      frames before the clip
    times      (total,) seconds of each of its frames from the start of the container, in order
    end        seconds at which its last frame ends. If the file goes on for more than a second after its pictures, such as
               the music of a slide show, players hold the last picture until then
    clip       the clip; None for the whole file, also where it is the clip that was to be cut (`clip_in`)
    cut_before the file is the clip that was to be cut
    ends       seconds at which the pictures and the whole file end; empty where unknown
    origin     start of the container in the stream's units; None where packets have no times and nothing is known
    seekable   packets have display times, so that decoding can start at a clip's key frame. AVI has none: its frames are
               counted
    all_shown  every packet is a frame that is shown
    stream, streams  index of the stream in the file, and the number of video streams
    indexed    the container has an index of its packets, MP4 or Matroska, so that every decoder seeks to the same place
    pictures   what the headers of the packets prove, with the reason where they prove nothing
    """

    first: int = 0
    times: np.ndarray = field(default_factory=lambda: np.zeros(0))
    end: float = 0.0
    clip: Clip = None
    cut_before: bool = False
    ends: tuple[float, ...] = ()
    origin: int | None = None
    seekable: bool = True
    all_shown: bool = False
    stream: int = 0
    streams: int = 1
    indexed: bool = False
    pictures: Pictures = field(default_factory=lambda: Pictures(problem="packets without times"))

    @property
    def total(self) -> int:
        """Frames in the clip."""
        return len(self.times)

    @property
    def regular(self) -> bool:
        """Every packet is a shown frame with a time, so that all decoders count the same frames."""
        return self.origin is not None and self.seekable and self.all_shown

    @property
    def thinnable(self) -> bool:
        """The headers prove that each packet is one shown frame, so that a decoder can do without some."""
        return self.regular and not self.pictures.problem

    def ticks(self, indices: np.ndarray) -> np.ndarray:
        """Display times (n,) int64 in the stream's units of frames of a `thinnable` file, by their index in the clip."""
        return self.pictures.in_display_order[self.first + indices]


def read_packets(path: Path, clip: Clip) -> Packets:
    """The frames of a clip, or of the whole file. Raises DecodeError for damage and for a clip that is not in the file."""
    with open_container(path) as container:
        stream = video_stream(container, path)
        hides, count = stream.codec_context.codec.name == "vp8", len(container.streams.video)
        packets = [p for p in container.demux(stream) if p.size]
        shown = [p for p in packets if not (p.is_discard or (hides and not bytes(p)[0] & _VP8_SHOWN))]
        whole = len(shown) == len(packets)
        pictures = read_pictures(stream, packets) if whole else Pictures(problem="packets without a frame")
        unit, announced = stream.time_base, _announced(container, stream)
        start, seekable = container.start_time, not _counts_frames(container, shown)
        indexed = bool(_INDEXED & set(container.format.name.split(",")))
        stream_index, file_end = stream.index, _file_end(container, path)
    found = [p.pts if seekable else p.dts for p in shown]
    ticks = sorted(t for t in found if t is not None)
    if len(ticks) < len(found) or not ticks or unit is None:
        return Packets(clip=clip, stream=stream_index, streams=count)
    # Other streams may start earlier: players count time from the first of all. Rounded, because it is in microseconds.
    origin = ticks[0] if start is None or not seekable else min(ticks[0], round(start / av.time_base / unit))
    known = max(t + (p.duration or 0) for t, p in zip(found, shown) if t is not None)
    last = max(known, ticks[-1] + _step(ticks))
    seconds = np.array([float((t - origin) * unit) for t in ticks])
    end = float((last - origin) * unit)
    if announced is not None and float(max(last, last - ticks[0]) * unit) < announced - CLIP_TOLERANCE:
        raise DecodeError(f"{path}: its frames end at {seconds[-1]:.2f} s of {announced:.2f} s; the file is damaged")
    stated = float(((known if known > ticks[-1] else last) - origin) * unit)
    ends = (stated, max(stated, file_end - float(origin * unit)))
    if ends[1] > end + CLIP_TOLERANCE:
        end = ends[1]
    wanted, clip = clip, clip_in(path, clip, ends, float(seconds[-1]))
    within = np.array([inside(t, clip) for t in seconds])
    if clip is not None:
        end = min([end, clip[1], *seconds[seconds >= clip[1]][:1]])
    return Packets(
        first=0 if clip is None else int((seconds < clip[0]).sum()),
        times=seconds[within],
        end=end,
        clip=clip,
        cut_before=clip != wanted,
        ends=ends,
        origin=origin,
        seekable=seekable,
        all_shown=whole,
        stream=stream_index,
        streams=count,
        indexed=indexed,
        pictures=pictures,
    )


def inside(seconds: float, clip: Clip) -> bool:
    """Whether a frame that is first shown at this time belongs to a clip."""
    return clip is None or clip[0] <= seconds < clip[1]


def _file_end(container: InputContainer, path: Path) -> float:
    """Seconds at which the file ends, on the clock of its packets; 0 where only its pictures have an end.

    MP4 has a length for each stream, of which that of the sound counts. Matroska and FLV have one for the file, and AVI
    counts its frames, repeated ones included. Other formats have none, and FFmpeg's estimates are not used.
    """
    names = set(container.format.name.split(","))
    if names & {"matroska", "flv"}:
        return (container.duration or 0) / av.time_base
    if "avi" in names:
        return duration(path) or 0.0
    sound = [s for s in container.streams.audio if s.duration and s.time_base] if "mp4" in names else []
    return max((float(((s.start_time or 0) + (s.duration or 0)) * (s.time_base or 0)) for s in sound), default=0.0)


def _counts_frames(container: InputContainer, packets: list[Packet]) -> bool:
    """Whether the times of a file are no display times: AVI numbers its frames in the order of decoding.

    FFmpeg adds an estimate of the delay to them, which is wrong where frames are reordered.
    """
    return container.format.name == "avi" and any(p.pts != p.dts for p in packets)


def _step(ticks: list[int]) -> int:
    """The usual time between frames; a last frame without a duration is shown as long."""
    return int(np.median(np.diff(ticks))) if len(ticks) > 1 else 0


def _announced(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds in the stream's header. A container's duration may be that of the audio; other formats estimate it."""
    if not _INDEXED & set(container.format.name.split(",")):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        return None
