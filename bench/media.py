"""Videos for decoding benchmarks: as long as the training set's mean, one encoded part repeated many times."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

SECONDS, RATE = 52, 30
FRAMES = SECONDS * RATE
SIZES = {"360p": (640, 360), "720p": (1280, 720)}
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "H.264": ("libx264", ".mp4", {"preset": "veryfast", "bf": "2", "x264-params": "open-gop=0"}),
    "VP9": ("libvpx-vp9", ".webm", {"cpu-used": "8", "deadline": "realtime"}),
}
_PART = 60
"""Frames that are encoded, from one key frame to the next; encoding all 1,560 frames of 720p would take a minute."""


def write_video(path: Path, codec: str, size: str) -> Path:
    """Write a 52 s video of a moving textured scene at about the bit rate of web video."""
    name, suffix, options = CODECS[codec]
    width, height = SIZES[size]
    path = path.with_name(path.name + suffix)  # with_suffix would cut the ".264" of "H.264"
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 8 + 16, width // 8 + 16, 3), dtype=np.uint8)
    texture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    for axis in (0, 1):  # Blurred, as cameras do not produce edges one pixel wide.
        texture = np.mean([np.roll(texture, i, axis) for i in range(-4, 5)], axis=0).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=RATE, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 700_000 if size == "360p" else 2_000_000
        stream.codec_context.gop_size = _PART
        packets = []
        for i in range(_PART):
            part = np.ascontiguousarray(texture[i : i + height, 2 * i : 2 * i + width])
            packets += stream.encode(av.VideoFrame.from_ndarray(part, format="rgb24"))
        packets += stream.encode()
        unit = packets[0].time_base
        assert unit is not None
        step = 1 / (RATE * unit)
        content = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        for repeat in range(FRAMES // _PART):
            for data, pts, dts, is_key in content:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = stream, unit, is_key
                assert pts is not None and dts is not None
                packet.pts, packet.dts = (round(t + repeat * _PART * step) for t in (pts, dts))
                packet.duration = round(step)
                container.mux(packet)
    return path


def link_ffmpeg(directory: Path) -> None:
    """Link PyAV's FFmpeg libraries under their usual names, so that torchcodec finds them through LD_LIBRARY_PATH."""
    for library in (Path(av.__file__).parents[1] / "av.libs").iterdir():
        if found := re.fullmatch(r"(lib(?:av|sw)\w+)-[0-9a-f]+(\.so\.\d+)[.\d]*", library.name):
            (directory / "".join(found.groups())).symlink_to(library)
