"""Sizes that DALI cannot confuse, whatever it decoded before: a function of the file alone.

DALI 2.4.0 keeps NVDEC's decoders by the size that they show, and looks for one by the coded size that NVDEC's parser reports
of the next file. A file whose coded size is the shown size of another one is then decoded in the other's layout, without an
error. Files of H.264 are given to DALI uncropped, in whole macroblocks of 16 x 16 pixels: both sizes are the same. Whether the
parser rounds the sizes of HEVC, VP8 and VP9 up to whole macroblocks, in parts or not at all is not documented. So of these
codecs DALI gets sizes of whole macroblocks, and `COMMON` ones, except those to which a common size may be rounded. Then no
size that DALI gets can be rounded to another that it gets.
"""

from __future__ import annotations

from itertools import product

MACROBLOCK = 16
_UNITS = (1, 2, 4, 8, MACROBLOCK)

Size = tuple[int, int]

_SHOWN: tuple[Size, ...] = ((426, 240), (480, 270), (640, 360), (854, 480), (960, 540), (1920, 1080))
"""(width, height) of videos from the web that are not whole macroblocks; they are also turned by a quarter."""


def _rounded(size: Size, units: Size) -> Size:
    return -(-size[0] // units[0]) * units[0], -(-size[1] // units[1]) * units[1]


def _in_blocks(unit: int) -> frozenset[Size]:
    """The shown sizes, both ways up, in blocks of `unit` pixels."""
    turned = [*_SHOWN, *(size[::-1] for size in _SHOWN)]
    return frozenset(size for s in turned if not is_whole(size := _rounded(s, (unit, unit))))


def is_whole(size: Size) -> bool:
    """Whether a size is one of whole macroblocks."""
    return not (size[0] % MACROBLOCK or size[1] % MACROBLOCK)


# HEVC codes a picture in blocks of at least 8 x 8 pixels (7.4.3.2.1).
COMMON = {"hevc": _in_blocks(8), "vp8": _in_blocks(1), "vp9": _in_blocks(1)}
"""FFmpeg's name of a codec -> sizes in which its files are decoded."""

_ROUNDED = {
    codec: {_rounded(size, (across, down)) for size in sizes for across, down in product(_UNITS, _UNITS)}
    for codec, sizes in COMMON.items()
}


def may_be_confused(codec: str, size: Size) -> bool:
    """Whether DALI may confuse a file that is decoded in this (width, height) with another one that it gets."""
    common = COMMON.get(codec, frozenset())
    return size not in common and (not is_whole(size) or size in _ROUNDED.get(codec, ()))
