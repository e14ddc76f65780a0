"""Packets of VP8 (RFC 6386) and VP9 (VP9 bitstream specification, version 0.6): one shown frame each, or Irregular."""

from __future__ import annotations

from dataloaders.decode.bitstream.bits import Bits, Irregular
from dataloaders.decode.bitstream.picture import CLEAN, NOT, Picture

_VP8_HEADER, _VP9_HEADER = 10, 32
_VP9_SYNC = 0x498342
_RGB = 7


class Vp8:
    """Reads packets of VP8."""

    def __init__(self, extradata: bytes) -> None:
        pass

    def read(self, data: bytes) -> Picture:
        """The picture of the next packet."""
        if len(data) < 3 or not data[0] & 0x10:
            raise Irregular("hidden pictures")
        if data[0] & 1:
            return Picture()
        header = Bits(data[:_VP8_HEADER])
        header.u(48)
        width, height = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        return Picture(restart=CLEAN, size=(width, height))


class Vp9:
    """Reads packets of VP9. One may hold several frames, a superframe, of which libavcodec gives those that are shown."""

    def __init__(self, extradata: bytes) -> None:
        pass

    def read(self, data: bytes) -> Picture:
        """The picture of the next packet."""
        frames = [_vp9_frame(frame) for frame in superframe(data)]
        shown = [frame for frame, is_shown in frames if is_shown]
        if len(shown) != 1:
            raise Irregular("packets that are not one shown frame")
        if len(frames) == 1:
            return shown[0]
        sizes = {frame.size for frame, _ in frames} - {None}
        # Its first frame decides whether decoding can start here.
        return Picture(frames[0][0].restart, size=sizes.pop() if len(sizes) == 1 else None, hidden="hidden pictures")


def superframe(data: bytes) -> list[bytes]:
    """The frames of a packet, by the index at its end (Annex B)."""
    last = data[-1] if data else 0
    count, width = (last & 7) + 1, (last >> 3 & 3) + 1
    length = 2 + count * width
    if last & 0xE0 != 0xC0 or len(data) < length or data[-length] != last:
        return [data]
    sizes = [int.from_bytes(data[-length + 1 + i * width :][:width], "little") for i in range(count)]
    if sum(sizes) + length > len(data):
        raise Irregular("a packet that ends early")
    frames, position = [], 0
    for size in sizes:
        frames.append(data[position : position + size])
        position += size
    return frames


def _vp9_frame(data: bytes) -> tuple[Picture, bool]:
    """A frame, and whether it is shown (6.2, uncompressed header)."""
    bits = Bits(data[:_VP9_HEADER])
    if bits.u(2) != 2:
        raise Irregular("packets that are not one picture")
    profile = bits.u(1) | bits.u(1) << 1
    if profile == 3:
        bits.u(1)
    if bits.flag():
        return Picture(hidden="a frame that is shown again"), True
    inter, shown, resilient = bits.flag(), bits.flag(), bits.flag()
    if not inter:
        return Picture(CLEAN, size=_vp9_intra_size(bits, profile, refresh=False)), shown
    intra_only = not shown and bits.flag()
    if not resilient:
        bits.u(2)
    if intra_only:
        return Picture(NOT, size=_vp9_intra_size(bits, profile, refresh=True)), shown
    bits.u(8 + 3 * 4)  # which references it replaces, and which it uses
    # The size is that of a reference, or its own.
    size = None if any(bits.flag() for _ in range(3)) else (bits.u(16) + 1, bits.u(16) + 1)
    return Picture(NOT, size=size), shown


def _vp9_intra_size(bits: Bits, profile: int, refresh: bool) -> tuple[int, int]:
    """The size of a frame without references; `refresh` for one that is not a key frame."""
    if bits.u(24) != _VP9_SYNC:
        raise Irregular("packets that are not one picture")
    if not (refresh and profile == 0):  # such frames of profile 0 hold no colour description
        if profile >= 2:
            bits.u(1)
        if bits.u(3) != _RGB:
            bits.u(1)
            if profile in (1, 3):
                bits.u(3)
        elif profile in (1, 3):
            bits.u(1)
    if refresh:
        bits.u(8)
    size = bits.u(16) + 1, bits.u(16) + 1
    if bits.flag() and (bits.u(16) + 1, bits.u(16) + 1) != size:
        raise Irregular("a size to be shown that is not its own")  # FFmpeg ignores it, and NVDEC may crop to it.
    return size
