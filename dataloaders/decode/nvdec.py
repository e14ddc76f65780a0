"""NVDEC, the video decoder of NVIDIA's GPUs: whether it can be used here, with how many engines, and for which sizes.

The driver's libnvcuvid answers (`cuvidGetDecoderCaps` of NVIDIA's Video Codec SDK). Containers have that library only with the
capability `video`, and some slices of a partitioned GPU (MIG) have no engine. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvcuvid.so.1"
_CURE = (
    "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video, or install the driver's video libraries"
    " (libnvidia-decode), or use --decoder pyav"
)
_CODECS = {"h264": 4, "hevc": 8, "vp8": 9, "vp9": 10}
"""FFmpeg's name of a codec -> its number in cudaVideoCodec."""

_CHROMA_420 = 1

SMALLEST = {"h264": (48, 16), "hevc": (144, 144), "vp8": (48, 16), "vp9": (128, 128)}
LARGEST = {"h264": (4096, 4096), "hevc": (8192, 8192), "vp8": (4096, 4096), "vp9": (8192, 8192)}
"""Least and most (width, height) of each codec, from NVIDIA's tables for Ampere and Hopper."""


class _Caps(ctypes.Structure):
    """CUVIDDECODECAPS of nvcuvid.h, with room for more."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved_1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("most_width", ctypes.c_uint),
        ("most_height", ctypes.c_uint),
        ("most_macroblocks", ctypes.c_uint),
        ("least_width", ctypes.c_ushort),
        ("least_height", ctypes.c_ushort),
        ("reserved_2", ctypes.c_uint * 64),
    )


@dataclass(frozen=True)
class Capabilities:
    """What NVDEC does with a codec of 8 bits, 4:2:0, on the current device; `engines` is the number of its decoders."""

    supported: bool
    engines: int
    smallest: tuple[int, int]
    largest: tuple[int, int]


def library() -> Any:
    """The driver's library. Raises ValueError with the cure where there is none."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ValueError(f"NVDEC cannot be used here ({error}); {_CURE}") from None


def capabilities(codec: str, loaded: Any = None) -> Capabilities | None:
    """Capabilities of the current CUDA device, which must have a context; None where the driver does not give them."""
    loaded = library() if loaded is None else loaded
    caps = _Caps(codec=_CODECS[codec], chroma=_CHROMA_420)
    try:
        if loaded.cuvidGetDecoderCaps(ctypes.byref(caps)) != 0:
            return None
    except AttributeError:
        return None
    smallest, largest = (caps.least_width, caps.least_height), (caps.most_width, caps.most_height)
    return Capabilities(bool(caps.supported), caps.engines, smallest, largest)


def require(loaded: Any = None) -> None:
    """Raise ValueError with the cure where the current CUDA device has no NVDEC that can be used."""
    found = capabilities("h264", library() if loaded is None else loaded)
    if found is not None and not found.supported:
        raise ValueError("this GPU has no NVDEC engine: use a slice (MIG) that has one, another GPU, or --decoder pyav")


def refuses(codec: str, size: tuple[int, int]) -> bool:
    """Whether a size (width, height) is below or above what NVDEC decodes, by `SMALLEST` and `LARGEST`."""
    limits = zip(SMALLEST.get(codec, (0, 0)), size, LARGEST.get(codec, size))
    return any(not least <= length <= most for least, length, most in limits)
