"""How DALI 2.4.0 counts frames and chooses decoders on a GPU, as its sources read: a model, not DALI itself.

It takes a frame from each call of its decoder, in the order of decoding, and gives it the time of the oldest packet that has
none yet. Eight frames wait; the one with the smallest time is the next. Times are 32-bit numbers, and -1 marks an empty
place. A cached decoder is used for a file whose coded size is the size that the decoder shows.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.packet import Packet

SLOTS = 8
HIDDEN = -(2**60)
NO_TIME = -(2**63)


def split(content: bytes) -> list[tuple[int, list[bytes]]]:
    """The time of each packet and the frames in it, by FFmpeg's splitter of VP9's superframes."""
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        if stream.codec_context.codec.canonical_name != "vp9":
            return [(_time(p), [bytes(p)]) for p in container.demux(stream) if p.size]
        splitter = BitStreamFilterContext("vp9_superframe_split", stream)
        return [(_time(p), [bytes(f) for f in splitter.filter(p)]) for p in container.demux(stream) if p.size]


def _time(packet: Packet) -> int:
    return NO_TIME if packet.pts is None else packet.pts


def calls(content: bytes) -> list[tuple[int, list[int]]]:
    """For each packet its time and the pictures that its decoding gives: the time of a shown one, HIDDEN or less for others."""
    found, number = [], 0
    is_vp9 = _codec(content) == "vp9"
    for time, frames in split(content):
        pictures = []
        for place, frame in enumerate(frames):
            number += 1
            if is_vp9 and frame[0] & 0x08:
                continue  # It shows an earlier picture again: nothing is decoded.
            pictures.append(time if place == len(frames) - 1 else HIDDEN - number)
        found.append((time, pictures))
    return found


def _codec(content: bytes) -> str:
    with av.open(io.BytesIO(content), "r") as container:
        return container.streams.video[0].codec_context.codec.canonical_name


def frames_of(packets: list[tuple[int, list[int]]]) -> list[int]:
    """The pictures that DALI counts as frame 0, 1, 2, ..., given `calls`."""
    out: list[int] = []
    slots: list[tuple[int, int]] = []
    times = [time for time, _ in packets]
    for _, pictures in packets:
        if not pictures:
            continue
        time = int(np.array(times.pop(0)).astype(np.int32))
        slots += [(time, picture) for picture in pictures if time != -1]
        while len(slots) >= SLOTS:
            slots.remove(first := min(slots, key=lambda slot: slot[0]))
            out.append(first[1])
    return out + [picture for _, picture in sorted(slots, key=lambda slot: slot[0])]


def counts_right(content: bytes, indices: np.ndarray | None = None) -> bool:
    """Whether the frames that DALI takes for those with these indices, or for all, are those that FFmpeg shows."""
    packets = calls(content)
    expected = sorted(time for time, _ in packets)
    if len(set(expected)) < len(expected):
        return False  # Frames of one time, or of none, have no order.
    found = frames_of(packets)
    wanted = range(len(expected)) if indices is None else indices.tolist()
    return all(i < len(found) and found[i] == expected[i] for i in wanted)


@dataclass
class DecoderCache:
    """DALI's cache: the sizes that its decoders show."""

    shown: list[tuple[int, int]] = field(default_factory=list)

    def layout(self, coded: tuple[int, int], shown: tuple[int, int]) -> tuple[int, int]:
        """The picture size of the decoder that a file gets: the file's own, if it is right."""
        if coded in self.shown:
            return coded
        self.shown.append(shown)
        return shown
