"""Packets of H.264 (ITU-T H.264): one frame picture each, or Irregular."""

from __future__ import annotations

from dataloaders.decode.bitstream.bits import Bits, Irregular
from dataloaders.decode.bitstream.nal import payload, units
from dataloaders.decode.bitstream.picture import CLEAN, NOT, Picture

_SLICE, _IDR, _SPS = 1, 5, 7
_PARTITIONS, _LAYERS = range(2, 5), (14, 15, 20, 21)
_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)
"""Profiles whose sequence parameter set holds the chroma format (7.3.2.1.1)."""


class H264:
    """Reads packets of H.264. Raises Irregular for streams that are interlaced or change their parameters."""

    def __init__(self, extradata: bytes) -> None:
        self._sps: bytes | None = None
        self._length_size = 0
        if extradata[:1] == b"\1":
            self._length_size = (extradata[4] & 3) + 1
            for unit in _parameter_sets(extradata):
                self._check(unit)
        else:
            for unit in units(extradata, 0):
                self._check(unit)

    def read(self, data: bytes) -> Picture:
        """The picture of the next packet."""
        pictures, kinds = 0, set()
        for unit in units(data, self._length_size):
            self._check(unit)
            kind = unit[0] & 31 if unit else 0
            if kind in (_SLICE, _IDR) and len(unit) > 1:
                pictures += unit[1] >> 7  # first_mb_in_slice is 0
                kinds.add((kind, unit[0] & 0x60 != 0))
        if pictures != 1 or len(kinds) != 1:
            raise Irregular("packets that are not one picture")
        ((kind, reference),) = kinds
        return Picture(restart=CLEAN if kind == _IDR else NOT, reference=reference)

    def _check(self, unit: bytes) -> None:
        """Check a unit that describes the stream."""
        kind = unit[0] & 31 if unit else 0
        if kind in _PARTITIONS or kind in _LAYERS:
            raise Irregular("data partitions" if kind in _PARTITIONS else "several layers")
        if kind != _SPS:
            return
        if self._sps is None:
            if not is_progressive(unit):
                raise Irregular("interlaced")
            self._sps = unit
        elif self._sps != unit:
            raise Irregular("parameters that change")


def _parameter_sets(extradata: bytes) -> list[bytes]:
    """The sequence parameter sets of an AVCDecoderConfigurationRecord (ISO/IEC 14496-15, 5.2.4.1)."""
    found, position = [], 6
    for _ in range(extradata[5] & 31):
        start = position + 2
        position = start + int.from_bytes(extradata[position:start])
        found.append(extradata[start:position])
    return found


def is_progressive(sps: bytes) -> bool:
    """Whether all pictures are frames, by frame_mbs_only_flag of a sequence parameter set (7.3.2.1.1)."""
    bits = Bits(payload(sps)[1:])
    profile = bits.u(8)
    bits.u(16)
    bits.ue()
    if profile in _WITH_CHROMA:
        _skip_chroma(bits)
    bits.ue()  # log2_max_frame_num_minus4
    order = bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.flag()
        bits.se()
        bits.se()
        for _ in range(bits.ue()):
            bits.se()
    bits.ue()  # max_num_ref_frames
    if bits.flag():
        raise Irregular("gaps between its frame numbers")
    bits.ue()  # width and height, in macroblocks
    bits.ue()
    return bits.flag()


def _skip_chroma(bits: Bits) -> None:
    chroma = bits.ue()
    if chroma == 3:
        bits.flag()
    bits.ue()
    bits.ue()
    bits.flag()
    if not bits.flag():
        return
    for i in range(8 if chroma != 3 else 12):
        if bits.flag():
            _skip_scaling_list(bits, 16 if i < 6 else 64)


def _skip_scaling_list(bits: Bits, length: int) -> None:
    last = scale = 8
    for _ in range(length):
        if scale:
            scale = (last + bits.se()) % 256
        last = scale or last
