"""Choose the files that DALI decodes. Each is probed in a worker process first, where it may hang or crash.

DALI never opens a video's own file. It gets one with the needed packets alone (`thinned_file`), so that

- what it would count differently is found in headers before, and decoded by PyAV: DALI 2.4.0 counts decoded pictures, takes
  a frame from each call of its decoder and orders them by the smallest time of eight;
- times are 0, 1, 2, ... at a constant rate, whatever those of the file: negative, equal and huge ones confuse it;
- it decodes from the first frame of its file to the last wanted one, and finds nothing there that is not needed;
- pictures of H.264 and HEVC are not cropped by their parameters. DALI's cache of NVDEC decoders compares the coded size of
  a file with the shown size of earlier ones, so a file of 1280 x 536 pixels, coded as 1280 x 544, would get the decoder and
  the picture layout of one of 1280 x 544, and no file of 640 x 360 (coded 368) would find a decoder. They are cropped
  after decoding instead. Sizes that DALI may confuse all the same are left to PyAV (`sizes`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

from dataloaders.decode import nvdec
from dataloaders.decode.bitstream.pictures import CHANGES_SIZE
from dataloaders.decode.dali.share import is_for_the_cpu
from dataloaders.decode.dali.sizes import may_be_confused
from dataloaders.decode.decoder import Decoded, decode_file, guarded
from dataloaders.decode.facts import Facts
from dataloaders.decode.orientation import UPRIGHT
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.stills import MAX_STILL_PIXELS
from dataloaders.decode.thinned import CROPPED, first_size, thinned_file
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

MAX_FILE = 128 * 2**20
"""Most bytes of a file's needed packets, since they are in memory. PyAV decodes files of more."""

_EXTREME = "a long and narrow picture"
_CONFUSED = "a size that DALI may confuse with another"

FRAME_MEMORY = {"cuda": 6 * 2**30, "cpu": 2**30}
"""Most bytes of the whole frames of a file. All are in memory before they are resized: 276 MB for 100 frames of 720p."""

BATCH_MEMORY = {device: 2 * memory for device, memory in FRAME_MEMORY.items()}
"""Bytes of the whole frames of all batches that are decoded at once."""


@dataclass(frozen=True)
class DecodeRequest:
    """A file for DALI to decode.

    indices     (u,) frames of `content` to decode, ascending, without repetition; empty for a still
    places      (N,) position in `indices` of each wanted frame
    memory      bytes of the whole frames
    matrix      FFmpeg's number of the colour matrix
    facts       what is reported of the file
    content     a file of the needed packets of a video; empty for a still
    size        (width, height) of the frames
    decoded     (width, height) in which DALI decodes them; what is right of and below `size` is cut off
    """

    media: Media
    codec: str
    indices: np.ndarray
    places: np.ndarray
    memory: int
    matrix: int = 2
    facts: Facts = field(default_factory=Facts)
    content: bytes = b""
    size: tuple[int, int] = (0, 0)
    decoded: tuple[int, int] = (0, 0)

    @property
    def sort_key(self) -> tuple[str, tuple[int, int], int]:
        """Codec, size and length: files with similar ones are decoded together."""
        return self.codec, self.decoded, len(self.content)


def prepare(
    media: Media,
    num_frames: int,
    preprocess: Preprocess,
    device: str,
    sampling: Sampling = "index",
    cpu_share: float = 0.0,
    by_dali: bool = True,
) -> Decoded | DecodeRequest:
    """A request if DALI can decode the file on `device`; otherwise PyAV's result: frames, or the reason for none.

    PyAV also decodes the CPU's share of the videos. `by_dali` is false where torchcodec takes DALI's place: DALI counts hidden
    pictures as frames and may confuse sizes.
    """
    decode = partial(decode_file, num_frames=num_frames, preprocess=preprocess, sampling=sampling)
    if media.kind == "video" and is_for_the_cpu(media, cpu_share):
        return guarded(decode, media)
    try:
        if media.kind == "image":
            request = _still(media, preprocess)
        else:
            request = _video(media, num_frames, preprocess, device, sampling, by_dali)
    except DecodeError as error:
        return Decoded(media, reason=str(error))
    except Exception as error:  # PyAV reports what is wrong with the file.
        request = f"{type(error).__name__}: {error}"
    return request if isinstance(request, DecodeRequest) else guarded(decode, media, by=f"PyAV ({request})")


def _video(
    media: Media, num_frames: int, preprocess: Preprocess, device: str, sampling: Sampling, by_dali: bool
) -> DecodeRequest | str:
    """A request for a video, or the reason why DALI cannot decode it."""
    probed = probe(media.path, media.clip)
    indices, places = np.unique(probed.indices(num_frames, sampling), return_inverse=True)
    memory = len(indices) * probed.height * probed.width * 3
    hidden = probed.packets.pictures.hidden
    size = probed.width, probed.height
    decoded = probed.coded if probed.codec in CROPPED else size
    problems = {
        f"DALI has no {probed.codec} on {device}": probed.codec not in CODECS[device],
        f"{probed.pixel_format} pixels": probed.pixel_format not in PIXEL_FORMATS,
        "rotated or mirrored": probed.orientation != UPRIGHT,
        f"colour matrix {probed.matrix}": probed.matrix not in BT709 + BT601,
        "full range": probed.full_range != (probed.codec == "mjpeg"),
        "several video streams": probed.packets.streams > 1,
        "packets without a frame": not probed.regular,
        "odd size": bool(probed.width % 2 or probed.height % 2),
        "interlaced": probed.interlaced,
        _EXTREME: preprocess.is_extreme(probed.height, probed.width),
        "large frames": memory > FRAME_MEMORY[device],
        probed.packets.pictures.problem: bool(probed.packets.pictures.problem),
        hidden: bool(hidden) and (by_dali or hidden == CHANGES_SIZE),
        "a size that NVDEC does not decode": device == "cuda" and nvdec.refuses(probed.codec, probed.coded),
        _CONFUSED: device == "cuda" and by_dali and may_be_confused(probed.codec, decoded),
    }
    why = next((name for name, is_so in problems.items() if is_so), None)
    if why is not None:
        return why
    thinned = thinned_file(media.path, probed.packets.pictures, probed.packets.ticks(indices - probed.first), decoded)
    if len(thinned.content) > MAX_FILE:
        return "a long file"
    if first_size(thinned.content) != decoded:
        return "cropped at the left or at the top"
    return DecodeRequest(
        media=media,
        codec=probed.codec,
        indices=thinned.indices,
        places=places,
        memory=memory,
        matrix=probed.matrix,
        facts=probed.facts(num_frames),
        content=thinned.content,
        size=size,
        decoded=decoded,
    )


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
