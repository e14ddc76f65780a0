"""The needed packets of a video alone: decoded by PyAV, or as a file of their own for another decoder.

The headers prove which packets are needed (`bitstream`). A decoder that starts anew, after packets were left out, is
flushed first. Whether all needed packets were found is checked: some files cannot be seeked precisely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dataloaders.decode.bitstream.pictures import Pictures
from dataloaders.decode.bitstream.thinning import needed
from dataloaders.decode.packets import open_container, video_stream


class PacketsMissing(Exception):
    """The file did not give the needed packets."""


def decode_needed(path: Path, pictures: Pictures, wanted: np.ndarray) -> Iterator[VideoFrame]:
    """Decode the packets that the frames with the `wanted` display times (n,) need; yields these and some others.

    Raises PacketsMissing at the end, and FFmpegError for damage.
    """
    plan = needed(pictures, wanted)
    positions = np.flatnonzero(plan.kept)
    waiting = dict(zip(pictures.ticks[positions].tolist(), plan.fresh[positions].tolist()))
    with open_container(path) as container:
        stream = video_stream(container, path)
        context = stream.codec_context
        if positions[0]:
            container.seek(next(iter(waiting)), stream=stream, backward=True)
        started = False
        for packet in container.demux(stream):
            starts_anew = waiting.pop(packet.pts, None) if packet.size else None
            if starts_anew is None:
                continue
            if starts_anew and started:
                yield from context.decode(None)
                context.flush_buffers()
            started = True
            yield from context.decode(packet)
            if not waiting:
                break
        if waiting:
            raise PacketsMissing
        yield from context.decode(None)


_RATE = 25
CROPPED = ("h264", "hevc")
"""Codecs whose parameters crop the coded picture."""


@dataclass(frozen=True)
class Thinned:
    """A file of the needed packets alone, without sound.

    content  of the file
    indices  (n,) of the wanted frames, in display order
    """

    content: bytes
    indices: np.ndarray


def thinned_file(path: Path, pictures: Pictures, wanted: np.ndarray, whole: tuple[int, int] | None = None) -> Thinned:
    """The packets of a video that the frames with the `wanted` display times (n,) need, as a file.

    Every packet is one shown frame; frames follow each other at a constant rate, from a time that is not negative.

    whole  coded (width, height): pictures of H.264 and HEVC are not cropped at the right and at the bottom
    Raises PacketsMissing where the file cannot be written, and FFmpegError.
    """
    kept = needed(pictures, wanted, splice=True).kept
    ticks = pictures.ticks[kept]
    places = np.argsort(np.argsort(ticks))
    # Times of decoding are 0, 1, 2, ...; no frame is shown before it is decoded.
    times = places + max(0, int((np.arange(len(places)) - places).max()))
    content = BytesIO()
    with open_container(path) as container:
        stream = video_stream(container, path)
        packets = (packet for packet in container.demux(stream) if packet.size)
        chosen = [packet for packet, is_kept in zip(packets, kept) if is_kept]
        if [packet.pts for packet in chosen] != ticks.tolist():
            raise PacketsMissing
        if whole is not None and stream.codec_context.codec.canonical_name in CROPPED:
            _write_whole(content, stream, chosen, times.tolist(), whole)
        else:
            _write(content, stream, chosen, times.tolist())
    return Thinned(content.getvalue(), np.searchsorted(np.sort(ticks), wanted))


def _write(content: BytesIO, stream: VideoStream, packets: list[Packet], times: list[int]) -> None:
    with av.open(content, "w", format="matroska") as output:
        try:
            target = output.add_stream_from_template(stream)
        except ValueError:  # PyAV looks for an encoder with the name of the decoder.
            raise PacketsMissing from None
        for number, (packet, time) in enumerate(zip(packets, times)):
            output.mux_one(_retimed(packet, target, number, time))


def _write_whole(
    content: BytesIO, stream: VideoStream, packets: list[Packet], times: list[int], size: tuple[int, int]
) -> None:
    """Write pictures of H.264 or HEVC with parameters that do not crop them."""
    codec = stream.codec_context.codec.canonical_name
    # The parameters are in the packets of this form, and the muxer reads them there.
    filters = BitStreamFilterContext(f"{codec}_mp4toannexb,{codec}_metadata=crop_right=0:crop_bottom=0", stream)
    # Without an edit list, which would shift the times.
    with av.open(content, "w", format="mp4", options={"use_editlist": "0"}) as output:
        target = output.add_mux_stream(codec, rate=_RATE, width=size[0], height=size[1])
        for number, (packet, time) in enumerate(zip(packets, times)):
            for filtered in filters.filter(packet):
                output.mux_one(_retimed(filtered, target, number, time))


def _retimed(packet: Packet, target: Stream, number: int, time: int) -> Packet:
    packet.stream, packet.time_base = target, Fraction(1, _RATE)
    packet.dts, packet.pts, packet.duration = number, time, 1
    return packet


def first_size(content: bytes) -> tuple[int, int]:
    """(width, height) of the first picture of a file, as decoded; (0, 0) where it cannot be decoded."""
    with av.open(BytesIO(content), "r") as container:
        context = container.streams.video[0].codec_context
        packet = next((p for p in container.demux(video=0) if p.size), None)
        frames = [] if packet is None else [*context.decode(packet), *context.decode(None)]
        return (frames[0].width, frames[0].height) if frames else (0, 0)
