"""Choose the files that DALI decodes. Each is probed in a worker process first, where it may hang or crash."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

from dataloaders.decode.decoder import Decoded, decode_file, guarded
from dataloaders.decode.facts import Facts
from dataloaders.decode.orientation import UPRIGHT
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.stills import MAX_STILL_PIXELS
from dataloaders.decode.video import probe
from dataloaders.records import Media

CODECS: dict[str, frozenset[str]] = {
    "cuda": frozenset({"h264", "hevc", "vp8", "vp9"}),
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
}
"""Video codecs that DALI decodes, by device. A100's, H100's and H200's NVDEC lacks AV1; DALI's CPU build has three."""

PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
BT709, BT601 = (1,), (2, 5, 6)
"""FFmpeg's numbers of colour matrices. 2 means unspecified, which all decoders treat as BT.601."""

MAX_FILE = 512 * 2**20
"""Largest file in bytes, since DALI reads the whole file into memory. PyAV decodes larger ones, by seeking."""

_EXTREME = "a long and narrow picture"

FRAME_MEMORY = {"cuda": 6 * 2**30, "cpu": 2**30}
"""Bytes of whole frames in a batch. All are in memory before they are resized: 276 MB for 100 frames of 720p."""


@dataclass(frozen=True)
class DecodeRequest:
    """A file for DALI to decode.

    indices     (u,) frames to decode, ascending, without repetition; empty for a still
    places      (N,) position in `indices` of each wanted frame
    memory      bytes of the whole frames
    matrix      FFmpeg's number of the colour matrix
    facts       what is reported of the file
    """

    media: Media
    codec: str
    indices: np.ndarray
    places: np.ndarray
    memory: int
    matrix: int = 2
    facts: Facts = field(default_factory=Facts)


def prepare(
    media: Media, num_frames: int, preprocess: Preprocess, device: str, sampling: Sampling = "index"
) -> Decoded | DecodeRequest:
    """A request if DALI can decode the file on `device`; otherwise PyAV's result: frames, or the reason for none."""
    try:
        if media.kind == "image":
            request = _still(media, preprocess)
        else:
            request = _video(media, num_frames, preprocess, device, sampling)
    except DecodeError as error:
        return Decoded(media, reason=str(error))
    except Exception as error:  # PyAV reports what is wrong with the file.
        request = f"{type(error).__name__}: {error}"
    if isinstance(request, DecodeRequest):
        return request
    decode = partial(decode_file, num_frames=num_frames, preprocess=preprocess, sampling=sampling)
    return guarded(decode, media, by=f"PyAV ({request})")


def _video(
    media: Media, num_frames: int, preprocess: Preprocess, device: str, sampling: Sampling
) -> DecodeRequest | str:
    """A request for a video, or the reason why DALI cannot decode it."""
    probed = probe(media.path, media.clip)
    indices, places = np.unique(probed.indices(num_frames, sampling), return_inverse=True)
    memory = len(indices) * probed.height * probed.width * 3
    problems = {
        f"DALI has no {probed.codec} on {device}": probed.codec not in CODECS[device],
        f"{probed.pixel_format} pixels": probed.pixel_format not in PIXEL_FORMATS,
        "rotated or mirrored": probed.orientation != UPRIGHT,
        f"colour matrix {probed.matrix}": probed.matrix not in BT709 + BT601,
        "full range": probed.full_range != (probed.codec == "mjpeg"),
        "several video streams": probed.packets.streams > 1,
        "packets without a frame": not probed.regular,
        "a long file": media.path.stat().st_size > MAX_FILE,
        _EXTREME: preprocess.is_extreme(probed.height, probed.width),
        "large frames": memory > FRAME_MEMORY[device],
    }
    why = next((name for name, is_so in problems.items() if is_so), None)
    facts = probed.facts(num_frames)
    return why or DecodeRequest(media, probed.codec, indices, places, memory, probed.matrix, facts)


def _still(media: Media, preprocess: Preprocess) -> DecodeRequest | str:
    """A request for a still, or the reason why DALI cannot decode it."""
    with Image.open(media.path) as image:
        width, height = image.size
        kind = f"{image.format} {image.mode}"
    if kind not in ("JPEG RGB", "JPEG L"):
        return kind
    if preprocess.is_extreme(height, width):
        return _EXTREME
    if height * width > MAX_STILL_PIXELS:
        return "a large still"
    with media.path.open("rb") as file:
        file.seek(-2, 2)
        if file.read() != b"\xff\xd9":
            return "no end mark"
    return DecodeRequest(media, "jpeg", np.zeros(0, np.int64), np.zeros(1, np.int64), height * width * 3)
