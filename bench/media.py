"""Videos for decoding benchmarks, as the web has them: x264's and x265's defaults, VP9, one encoded part repeated many times."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

SECONDS, RATE = 52, 30
"""Mean length of the training set's videos, and frames per second."""

FRAMES = SECONDS * RATE
GRAIN = 6.0
"""Standard deviation of the noise, of 255, without which pictures between others would need no bits."""

SIZES = {
    "360p": (640, 360),
    "720p": (1280, 720),
    "480p": (854, 480),
    "544": (1280, 544),
    "536": (1280, 536),
}


@dataclass(frozen=True)
class Codec:
    """An encoder with its options, and the frames from one key frame to the next, which are encoded and then repeated."""

    encoder: str
    suffix: str
    options: dict[str, str]
    part: int


CODECS = {
    "H.264": Codec("libx264", ".mp4", {"x264-params": "scenecut=0"}, 250),
    "HEVC": Codec("libx265", ".mp4", {"preset": "fast", "x265-params": "log-level=none:scenecut=0"}, 250),
    "VP9": Codec("libvpx-vp9", ".webm", {"cpu-used": "8", "deadline": "realtime"}, 60),
}


def write_video(path: Path, codec: str, size: str, frames: int | None = None) -> Path:
    """Write a video of a moving textured scene at about the bit rate of web video; FRAMES frames long, or `frames`."""
    chosen = CODECS[codec]
    width, height = SIZES[size]
    frames = FRAMES if frames is None else frames
    part = min(chosen.part, frames)
    path = path.with_name(path.name + chosen.suffix)  # with_suffix would cut the ".264" of "H.264"
    texture = _texture(height + part, width + 2 * part)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(chosen.encoder, rate=RATE, options=chosen.options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 700_000 * width * height // (640 * 360) if height < 500 else 2_000_000
        stream.codec_context.gop_size = chosen.part
        packets = []
        for i in range(part):
            picture = _scene(texture, i, height, width)
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode()
        unit = packets[0].time_base
        assert unit is not None
        step = 1 / (RATE * unit)
        content = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        for repeat in range(max(1, frames // part)):
            for data, pts, dts, is_key in content:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = stream, unit, is_key
                assert pts is not None and dts is not None
                packet.pts, packet.dts = (round(t + repeat * part * step) for t in (pts, dts))
                packet.duration = round(step)
                container.mux(packet)
    return path


def _scene(texture: np.ndarray, i: int, height: int, width: int) -> np.ndarray:
    """Frame `i` (H, W, 3) uint8: the camera pans over the texture, parts of it move on their own, and all of it is grainy."""
    picture = texture[i : i + height, 2 * i : 2 * i + width].copy()
    for number in range(8):
        size = height // (3 + number % 3)
        row = int((height - size) * (0.5 + 0.5 * np.sin(0.05 * i + number)))
        column = int((width - size) * (0.5 + 0.5 * np.sin(0.03 * i + 2 * number)))
        picture[row : row + size, column : column + size] = texture[-size:, number * size % (width - size) :][:, :size]
    grain = np.random.default_rng(i).normal(0, GRAIN, (-(-height // 2), -(-width // 2), 1)).repeat(2, 0).repeat(2, 1)
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def _texture(height: int, width: int) -> np.ndarray:
    """A random picture (H, W, 3) uint8 without edges one pixel wide, which cameras do not produce."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 8 + 16, width // 8 + 16, 3), dtype=np.uint8)
    texture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    for axis in (0, 1):
        texture = np.mean([np.roll(texture, i, axis) for i in range(-4, 5)], axis=0).astype(np.uint8)
    return texture


def link_ffmpeg(directory: Path) -> None:
    """Link PyAV's FFmpeg libraries under their usual names, so that torchcodec finds them through LD_LIBRARY_PATH."""
    for library in (Path(av.__file__).parents[1] / "av.libs").iterdir():
        if found := re.fullmatch(r"(lib(?:av|sw)\w+)-[0-9a-f]+(\.so\.\d+)[.\d]*", library.name):
            (directory / "".join(found.groups())).symlink_to(library)
