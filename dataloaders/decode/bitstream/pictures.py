"""The pictures of a stream, from the headers of its packets.

An encoder's output is in the order of decoding. What can be left out of it without a change of any other picture:

- pictures to which no other refers: nal_ref_idc 0 in H.264, sub-layer non-reference pictures of the highest temporal
  layer in HEVC;
- everything from one picture at which decoding can start to the next;
- what follows the last wanted picture, up to the next such place.

Only where the headers prove that each packet is one shown frame. `problem` names what they do not prove; such files are
decoded whole, and their frames are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream

from dataloaders.decode.bitstream.av1 import Av1
from dataloaders.decode.bitstream.bits import Irregular
from dataloaders.decode.bitstream.h264 import H264
from dataloaders.decode.bitstream.hevc import Hevc
from dataloaders.decode.bitstream.picture import CLEAN, NOT, HeaderReader, Picture
from dataloaders.decode.bitstream.vpx import Vp8, Vp9


class Still:
    """Reads packets of codecs in which every picture stands alone."""

    def __init__(self, extradata: bytes) -> None:
        pass

    def read(self, data: bytes) -> Picture:
        """The picture of the next packet."""
        return Picture(CLEAN)


READERS: dict[str, Callable[[bytes], HeaderReader]] = {
    "h264": H264,
    "hevc": Hevc,
    "vp8": Vp8,
    "vp9": Vp9,
    "av1": Av1,
    "mjpeg": Still,
}
"""FFmpeg's name of a codec -> the reader of its packets."""

CHANGES_SIZE = "frames that change size"


@dataclass(frozen=True)
class Pictures:
    """The packets of a stream in the order of decoding.

    ticks      (P,) int64 display times in the stream's units, all different
    restarts   (P,) NOT, OPEN or CLEAN
    spare      (P,) bool: no other picture refers to it
    leading    (P,) bool: it refers to pictures before the last OPEN one
    marked     packets are marked as key frames where the headers do not prove that decoding can start, as with intra refresh
    problem    why the headers do not prove that each packet is one shown frame; the arrays are then empty
    hidden     why a decoder that counts decoded pictures, as DALI does, would count others than those shown, or
               CHANGES_SIZE; else empty
    """

    ticks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    restarts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    spare: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    leading: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    marked: bool = False
    problem: str = ""
    hidden: str = ""

    @property
    def in_display_order(self) -> np.ndarray:
        """(P,) display times, ascending."""
        return np.sort(self.ticks)


def read_pictures(stream: VideoStream, packets: Sequence[Packet]) -> Pictures:
    """The pictures of all packets of a stream, or the reason why they are not proven to be one shown frame each."""
    context = stream.codec_context
    make = READERS.get(context.codec.canonical_name)
    if make is None:
        return Pictures(problem=f"{context.codec.canonical_name} packets")
    try:
        reader = make(bytes(context.extradata or b""))
        pictures = [reader.read(bytes(packet)) for packet in packets]
        found = _collect(pictures, [packet.pts for packet in packets])
        keys = np.array([packet.is_keyframe for packet in packets])
        return replace(found, marked=bool((keys & (found.restarts == NOT)).any()))
    except (Irregular, IndexError) as error:
        return Pictures(problem=str(error) if isinstance(error, Irregular) else "headers that end early")


def _collect(pictures: list[Picture], ticks: list[int | None]) -> Pictures:
    if not pictures or None in ticks or len(set(ticks)) < len(ticks):
        raise Irregular("equal or missing times")
    if pictures[0].restart == NOT:
        raise Irregular("a start in the middle")
    sizes = {p.size for p in pictures if p.size is not None}
    hidden = CHANGES_SIZE if len(sizes) > 1 else next((p.hidden for p in pictures if p.hidden), "")
    highest = max(p.layer for p in pictures)
    return Pictures(
        ticks=np.array(cast("list[int]", ticks), np.int64),
        restarts=np.array([p.restart for p in pictures]),
        spare=np.array([not p.reference and p.layer == highest for p in pictures]),
        leading=np.array([p.leading for p in pictures]),
        hidden=hidden,
    )
