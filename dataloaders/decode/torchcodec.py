"""torchcodec as a decoder, with the FFmpeg of the machine. Optional (`pip install torchcodec`).

Its exact mode and `probe` count the same packets. Where it finds fewer frames than packets, the fallback is PyAV, which
counts the frames by decoding them. PyAV also decodes AVI files whose frames are reordered, since torchcodec orders
frames by times that AVI does not store, and turned or mirrored videos, since torchcodec mirrors none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataloaders.decode.clips import Clip
from dataloaders.decode.orientation import UPRIGHT
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.video import Sampled, Transform, probe
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
    path: Path, num_frames: int, clip: Clip = None, transform: Transform | None = None, sampling: Sampling = "index"
) -> Sampled:
    """The same frames as `dataloaders.decode.video.sample_video`. Raises DecodeError."""
    from torchcodec.decoders import VideoDecoder

    probed = probe(path, clip)
    if not probed.regular or probed.orientation != UPRIGHT:
        return sample_with_pyav(path, num_frames, clip, transform, sampling)
    try:
        decoder = VideoDecoder(
            path.absolute(), stream_index=probed.packets.stream, num_ffmpeg_threads=1, seek_mode="exact"
        )
        if (decoder.metadata.num_frames or 0) < probed.first + probed.total:
            return sample_with_pyav(path, num_frames, clip, transform, sampling)
        distinct, places = np.unique(probed.indices(num_frames, sampling), return_inverse=True)
        # One frame at a time, to keep no whole frames in memory. Ascending indices need no seeking back.
        frames = (decoder.get_frame_at(i).data.permute(1, 2, 0).contiguous().numpy() for i in distinct.tolist())
        made = [frame if transform is None else transform(frame) for frame in frames]
        return Sampled([made[place] for place in places.tolist()], probed.facts(num_frames))
    except RuntimeError as error:
        raise DecodeError(f"{path}: torchcodec: {reason(error)}") from None
