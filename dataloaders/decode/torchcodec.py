"""torchcodec as a decoder, with the FFmpeg of the machine. Optional (`pip install torchcodec`).

Its exact mode and `probe` count the same packets. Where it finds fewer frames than packets, the fallback is PyAV, which
counts the frames by decoding them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataloaders.decode.video import Clip, DecodeError, Transform, frame_indices, probe
from dataloaders.decode.video import decode_video as decode_with_pyav
from dataloaders.errors import reason


def require() -> None:
    """Raise ValueError where torchcodec cannot be used."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"torchcodec cannot be used here ({reason(error)}); install it and FFmpeg, or use pyav"
        ) from None


def decode_video(path: Path, num_frames: int, clip: Clip = None, transform: Transform | None = None) -> np.ndarray:
    """The same frames as `dataloaders.decode.video.decode_video`, (N, H, W, 3) uint8. Raises DecodeError."""
    from torchcodec.decoders import VideoDecoder

    probed = probe(path, clip)
    if not probed.regular:
        return decode_with_pyav(path, num_frames, clip, transform)
    try:
        decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="exact")
        if (decoder.metadata.num_frames or 0) < probed.first + probed.total:
            return decode_with_pyav(path, num_frames, clip, transform)
        indices = probed.first + frame_indices(probed.total, num_frames)
        distinct, places = np.unique(indices, return_inverse=True)
        # One frame at a time, to keep no whole frames in memory. Ascending indices need no seeking back.
        frames = (decoder.get_frame_at(i).data.permute(1, 2, 0).contiguous().numpy() for i in distinct.tolist())
        return np.stack([frame if transform is None else transform(frame) for frame in frames])[places]
    except RuntimeError as error:
        raise DecodeError(f"{path}: torchcodec: {reason(error)}") from None
