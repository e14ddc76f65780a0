"""torchcodec as a decoder, with the FFmpeg of the machine. Optional (`pip install torchcodec`).

Its exact mode and `probe` count the same packets. Where it finds fewer frames than packets, the fallback is PyAV, which
counts the frames by decoding them. PyAV also decodes AVI files whose frames are reordered, since torchcodec orders
frames by times that AVI does not store, turned or mirrored videos, since torchcodec mirrors none, interlaced ones, whose colour swscale
interpolates by fields only in PyAV, and files in which it would seek to a wrong place: torchcodec 0.13 gave frame 12 for frame 6 of MPEG transport streams, which have no index, and
another picture where a packet is marked as a key frame that is none (intra refresh). Where the headers of the packets prove
which are needed, it reads a file of these alone.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from dataloaders.decode.clips import Clip
from dataloaders.decode.orientation import UPRIGHT
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.thinned import PacketsMissing, Thinned, thinned_file
from dataloaders.decode.video import Probe, Sampled, Transform, probe
from dataloaders.decode.video import sample_video as sample_with_pyav
from dataloaders.errors import reason


def require() -> None:
    """Raise ValueError where torchcodec cannot be used."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"torchcodec cannot be used here ({reason(error)}); install it and FFmpeg, or use pyav"
        ) from None


def sample_video(
    path: Path,
    num_frames: int,
    clip: Clip = None,
    transform: Transform | None = None,
    sampling: Sampling = "index",
    thinned: bool = True,
) -> Sampled:
    """The same frames as `dataloaders.decode.video.sample_video`. Raises DecodeError."""
    from torchcodec.decoders import VideoDecoder

    probed = probe(path, clip)
    needed = _needed(path, probed, num_frames, sampling) if thinned else None
    readable = probed.regular and (probed.packets.indexed or needed is not None) and not probed.packets.pictures.marked
    if not readable or probed.interlaced or probed.orientation != UPRIGHT:
        return sample_with_pyav(path, num_frames, clip, transform, sampling, thinned)
    distinct, places = np.unique(probed.indices(num_frames, sampling), return_inverse=True)
    source: str | bytes = str(path.absolute())
    stream, least = probed.packets.stream, probed.first + probed.total
    if needed is not None:
        source, stream, least, distinct = needed.content, 0, needed.indices[-1] + 1, needed.indices
    try:
        decoder = VideoDecoder(source, stream_index=stream, num_ffmpeg_threads=1, seek_mode="exact")
        if (decoder.metadata.num_frames or 0) < least:
            return sample_with_pyav(path, num_frames, clip, transform, sampling, thinned)
        # One frame at a time, to keep no whole frames in memory. Ascending indices need no seeking back.
        frames = (decoder.get_frame_at(i).data.permute(1, 2, 0).contiguous().numpy() for i in distinct.tolist())
        made = [frame if transform is None else transform(frame) for frame in frames]
        return Sampled([made[place] for place in places.tolist()], probed.facts(num_frames))
    except RuntimeError as error:
        raise DecodeError(f"{path}: torchcodec: {reason(error)}") from None


def _needed(path: Path, probed: Probe, num_frames: int, sampling: Sampling) -> Thinned | None:
    """The packets that N frames need, as a file; None where the file must be read as it is."""
    if not probed.packets.thinnable:
        return None
    wanted = probed.packets.ticks(np.unique(probed.indices(num_frames, sampling)) - probed.first)
    try:
        return thinned_file(path, probed.packets.pictures, wanted)
    except (av.FFmpegError, PacketsMissing):
        return None
