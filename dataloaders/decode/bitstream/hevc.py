"""Packets of HEVC (ITU-T H.265): one shown picture each, or Irregular."""

from __future__ import annotations

from dataloaders.decode.bitstream.bits import Bits, Irregular
from dataloaders.decode.bitstream.nal import payload, units
from dataloaders.decode.bitstream.picture import CLEAN, NOT, OPEN, Picture

_BLA, _IDR, _CRA, _IRAP = range(16, 19), range(19, 21), 21, range(16, 24)
_RASL, _SLICES, _REFERENCES = range(8, 10), range(32), 16
_SPS, _PPS, _END = 33, 34, range(36, 38)


class Hevc:
    """Reads packets of HEVC. Raises Irregular for streams that hide pictures, are interlaced or change their parameters."""

    def __init__(self, extradata: bytes) -> None:
        self._sps: bytes | None = None
        self._length_size = 0
        self._starts = True  # the next random access picture starts a sequence, so its RASL pictures cannot be decoded
        self._without_rasl = False
        described = bool(extradata) and extradata[:3] != b"\0\0\1" and extradata[:4] != b"\0\0\0\1"
        if described:
            self._length_size = (extradata[21] & 3) + 1 if len(extradata) > 22 else 4
        for unit in _parameter_sets(extradata) if described else units(extradata, 0):
            self._check(unit)

    def read(self, data: bytes) -> Picture:
        """The picture of the next packet."""
        pictures, kinds = 0, set()
        for unit in units(data, self._length_size):
            self._check(unit)
            kind = unit[0] >> 1 & 63 if len(unit) > 2 else 63
            if kind in _SLICES:
                pictures += unit[2] >> 7  # first_slice_segment_in_pic_flag
                kinds.add((kind, (unit[1] & 7) - 1))
        if pictures != 1 or len(kinds) != 1:
            raise Irregular("packets that are not one picture")
        ((kind, layer),) = kinds
        if kind in _IRAP:
            self._without_rasl = self._starts or kind in _BLA
            self._starts = False
        if self._starts or (self._without_rasl and kind in _RASL):
            raise Irregular("pictures without their references")
        return Picture(
            restart=CLEAN if kind in _IDR else OPEN if kind == _CRA or kind in _BLA else NOT,
            reference=kind >= _REFERENCES or kind % 2 == 1,
            leading=kind in _RASL,
            layer=layer,
        )

    def _check(self, unit: bytes) -> None:
        """Check a unit that describes the stream."""
        if len(unit) < 2:
            return
        kind = unit[0] >> 1 & 63
        if (unit[0] & 1) << 5 | unit[1] >> 3:
            raise Irregular("several layers")
        self._starts |= kind in _END
        if kind == _PPS and _hides_pictures(unit):
            raise Irregular("hidden pictures")
        if kind != _SPS:
            return
        if self._sps is None:
            if payload(unit[:24])[8] & 0x40:  # general_interlaced_source_flag (7.3.3)
                raise Irregular("interlaced")
            self._sps = unit
        elif self._sps != unit:
            raise Irregular("parameters that change")


def _hides_pictures(pps: bytes) -> bool:
    """Whether slices may hide their picture, by output_flag_present_flag of a picture parameter set (7.3.2.3.1)."""
    bits = Bits(payload(pps)[2:])
    bits.ue()
    bits.ue()
    bits.flag()
    return bits.flag()


def _parameter_sets(extradata: bytes) -> list[bytes]:
    """The units of an HEVCDecoderConfigurationRecord (ISO/IEC 14496-15, 8.3.3.1)."""
    found, position = [], 23
    for _ in range(extradata[22] if len(extradata) > 22 else 0):
        count = int.from_bytes(extradata[position + 1 : position + 3])
        position += 3
        for _ in range(count):
            start = position + 2
            position = start + int.from_bytes(extradata[position:start])
            found.append(extradata[start:position])
    return found
