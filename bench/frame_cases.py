"""Small videos of every kind that decoders may take wrong frames of: codecs, groups of pictures, containers and clips."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

RATE = 10
_LATE = tuple(7 * i * i + 10 * i for i in range(48))
"""Display times in milliseconds of a variable frame rate."""


@dataclass(frozen=True)
class Case:
    """A video to write, and the clip to decode.

    options    of the encoder
    muxing     options of the container
    start      frames by which the video starts late
    times      display times in milliseconds, for a variable frame rate
    command    arguments of ffmpeg's command line that make the file, of `{source}`, a file of this case without them
    """

    name: str
    codec: str
    suffix: str
    options: dict[str, str] = field(default_factory=dict)
    muxing: dict[str, str] = field(default_factory=dict)
    gop: int = 12
    frames: int = 40
    size: tuple[int, int] = (96, 72)
    pixels: str = "yuv420p"
    start: int = 0
    times: tuple[int, ...] | None = None
    clip: tuple[float, float] | None = None
    command: tuple[tuple[str, ...], ...] = ()

    @property
    def interpolated(self) -> bool:
        """Colour is interpolated differently by torchcodec: in odd sizes, and where pixels have another format."""
        return bool(self.size[0] % 2 or self.size[1] % 2) or self.pixels != "yuv420p"

    @property
    def needs_ffmpeg(self) -> bool:
        return bool(self.command)

    def time(self, index: int) -> float:
        """Seconds at which a frame is shown, from the start of the file."""
        return index / RATE if self.times is None else self.times[index] / 1000

    def write(self, folder: Path, ffmpeg: str | None) -> Path:
        """Write the video and return its path."""
        path = folder / f"{self.name.replace(' ', '_').replace(',', '')}{self.suffix}"
        source = path.with_name(f"source_{path.stem}{'.mkv' if self.codec == 'ffv1' else path.suffix}")
        self._encode(source if self.command else path)
        for arguments in self.command:
            assert ffmpeg is not None
            filled = [a.format(source=source, folder=folder, path=path) for a in arguments]
            subprocess.run([ffmpeg, "-v", "error", "-y", *filled], check=True, capture_output=True)
        return path

    def _encode(self, path: Path) -> None:
        with av.open(str(path), "w", options=self.muxing) as container:
            stream = container.add_stream(self.codec, rate=RATE, options=self.options)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height = self.size
            stream.pix_fmt = self.pixels
            stream.codec_context.gop_size = self.gop
            stream.bit_rate = 2_000_000
            if self.times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            container.start_encoding()
            for i in range(self.frames):
                frame = av.VideoFrame.from_ndarray(picture(i, self.size), format="rgb24").reformat(format=self.pixels)
                frame.pts = i + self.start if self.times is None else self.times[i]
                frame.time_base = Fraction(1, RATE) if self.times is None else Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def picture(i: int, size: tuple[int, int]) -> np.ndarray:
    """Frame `i` of a scene whose shades and shapes move: (H, W, 3) uint8, no two frames alike."""
    width, height = size
    y, x = np.mgrid[:height, :width] / max(size)
    shade = np.stack([x + 0.02 * i, y + 0.3 - 0.01 * i, (x + y) / 2 + 0.015 * i], -1) % 1
    frame = (255 * np.abs(2 * shade - 1)).astype(np.uint8)
    column = (5 * i) % width
    frame[height // 4 : height // 2, column : column + width // 4] = (200, 60, 40)
    frame[height // 2 : 3 * height // 4, width - 1 - column : width - 1 - column + width // 5] = (40, 80, 190)
    return frame


_X265 = "log-level=none:pools=1:frame-threads=1"
_VP9 = {"cpu-used": "8", "deadline": "realtime"}
_TWO_PASS = (
    ("-i", "{source}", "-c:v", "libvpx-vp9", "-b:v", "60k", "-pass", "1", "-passlogfile", "{path}", "-f", "null", "-"),
    ("-i", "{source}", "-c:v", "libvpx-vp9", "-b:v", "60k", "-pass", "2", "-passlogfile", "{path}", "{path}"),
)
_TEN_BITS = (("-i", "{source}", "-c:v", "libvpx-vp9", "-b:v", "200k", "-cpu-used", "8", "{path}"),)
_CUT = (("-ss", "1.05", "-i", "{source}", "-c", "copy", "{path}"),)


def _x264(name: str, suffix: str = ".mp4", **others: object) -> Case:
    parameters = others.pop("x264", "")
    options = {"threads": "1", "x264-params": str(parameters)} if parameters else {"threads": "1"}
    options |= others.pop("options", {})  # type: ignore[call-overload]
    return Case(f"x264 {name}", "libx264", suffix, options, **others)  # type: ignore[arg-type]


def _x265(name: str, suffix: str = ".mp4", x265: str = "", **others: object) -> Case:
    options = {"preset": "fast", "x265-params": f"{_X265}:{x265}".rstrip(":")}
    return Case(f"x265 {name}", "libx265", suffix, options, **others)  # type: ignore[arg-type]


def _vp9(name: str, suffix: str = ".webm", more: dict[str, str] | None = None, **others: object) -> Case:
    return Case(f"vp9 {name}", "libvpx-vp9", suffix, _VP9 | (more or {}), **others)  # type: ignore[arg-type]


def _h264_cases() -> Iterator[Case]:
    yield _x264("defaults", gop=250)
    yield _x264("baseline", options={"profile": "baseline"})
    yield _x264("no B-frames", options={"bf": "0"})
    yield _x264("eight B-frames, strict pyramid", x264="bframes=8:b-pyramid=strict:b-adapt=0")
    yield _x264("no pyramid", x264="bframes=3:b-pyramid=none:b-adapt=0")
    yield _x264("sixteen B-frames", x264="bframes=16:b-adapt=0", gop=40)
    yield _x264("open GOP", x264="open-gop=1:bframes=3:b-adapt=0")
    yield _x264("open GOP", ".ts", x264="open-gop=1:bframes=3:b-adapt=0")
    yield _x264("all intra", gop=1)
    yield _x264("GOP of 5", gop=5, x264="bframes=2:b-adapt=0")
    yield _x264("intra refresh", x264="intra-refresh=1:bframes=0", gop=20)
    yield _x264("defaults", ".mkv")
    yield _x264("defaults", ".ts")
    yield _x264("defaults", ".flv")
    yield _x264("defaults", ".mov")
    yield _x264("raw", ".h264")
    yield _x264("AUD", x264="aud=1:nal-hrd=vbr:vbv-maxrate=2000:vbv-bufsize=2000")
    yield _x264("four slices", x264="slices=4")
    yield _x264("weighted, five references", x264="weightp=2:ref=5:bframes=3")
    yield _x264("variable frame rate", times=_LATE, options={"bf": "2"})
    yield _x264("variable frame rate", ".mkv", times=_LATE, options={"bf": "2"})
    yield _x264("interlaced", x264="tff=1")
    yield _x264("cropped size", size=(98, 70))
    yield _x264("portrait", size=(72, 96))
    yield _x264("10 bits", pixels="yuv420p10le")
    yield _x264("4:4:4", pixels="yuv444p")
    yield _x264("lossless", options={"qp": "0"})
    yield _x264("fragmented", muxing={"movflags": "frag_keyframe+empty_moov"})
    yield _x264("index first", muxing={"movflags": "faststart"})
    yield _x264("late start", ".ts", start=50)
    yield _x264("late start", start=50)
    yield _x264("cut by an edit list", command=_CUT)
    yield _x264("three frames", frames=3)
    yield _x264("one frame", frames=1)


def _hevc_cases() -> Iterator[Case]:
    for suffix in (".mp4", ".mkv", ".ts", ".hevc"):
        yield _x265("defaults", suffix)
    yield _x265("GOP of 250", gop=250)
    yield _x265("closed GOP", x265="open-gop=0")
    yield _x265("open GOP of 6", gop=6, x265="bframes=3:b-adapt=0")
    yield _x265("no B-frames", x265="bframes=0")
    yield _x265("eight B-frames", x265="bframes=8:b-adapt=0")
    yield _x265("two temporal layers", x265="temporal-layers=2:bframes=4")
    yield _x265("all intra", gop=1)
    # With blocks of 64 pixels x265 writes a file that FFmpeg 5.1 and 8.1 decode differently, and both wrongly.
    yield _x265("two slices", x265="slices=2:ctu=32", size=(96, 160))
    yield _x265("variable frame rate", times=_LATE)
    yield _x265("cropped size", size=(98, 70))
    yield _x265("10 bits", pixels="yuv420p10le")
    yield _x265("parameters in packets", ".mkv", x265="repeat-headers=1")
    yield _x265("late start", ".ts", start=50)


def _other_cases() -> Iterator[Case]:
    yield _vp9("realtime")
    yield _vp9("good", more={"deadline": "good", "cpu-used": "5"})
    yield _vp9("two passes", command=_TWO_PASS)
    yield _vp9("two passes, 160 x 120", command=_TWO_PASS, size=(160, 120), frames=60, gop=30)
    yield _vp9("GOP of 5", gop=5)
    yield _vp9("GOP of 250", gop=250)
    yield _vp9("in MP4", ".mp4")
    yield _vp9("odd size", size=(97, 71))
    yield _vp9("variable frame rate", times=_LATE)
    yield _vp9("4:4:4", more={"profile": "1"}, pixels="yuv444p")
    yield Case("vp9 10 bits", "ffv1", ".webm", command=_TEN_BITS, pixels="yuv420p10le")
    yield _vp9("error resilient", more={"error-resilient": "1"})
    yield _vp9("frame parallel", more={"frame-parallel": "1"})
    for name, more in {"realtime": {}, "alternate references": {"auto-alt-ref": "1", "lag-in-frames": "16"}}.items():
        yield Case(f"vp8 {name}", "libvpx", ".webm", {"cpu-used": "8", "deadline": "good"} | more)
    yield Case("vp8 GOP of 5", "libvpx", ".mkv", {"cpu-used": "8"}, gop=5)
    yield Case("vp8 odd size", "libvpx", ".webm", {"cpu-used": "8"}, size=(97, 71))
    yield Case("vp8 variable frame rate", "libvpx", ".webm", {"cpu-used": "8"}, times=_LATE)
    for suffix in (".mp4", ".mkv"):
        yield Case("av1", "libsvtav1", suffix, {"preset": "12", "svtav1-params": "lp=1"}, gop=16)
    yield Case("av1 GOP of 100", "libsvtav1", ".mp4", {"preset": "12", "svtav1-params": "lp=1"}, gop=100)
    yield Case("mpeg4", "mpeg4", ".mp4", {"bf": "0"})
    yield Case("mpeg4 B-frames", "mpeg4", ".mp4", {"bf": "2"})
    yield Case("mpeg4 B-frames", "mpeg4", ".avi", {"bf": "2"})
    yield Case("mpeg2 B-frames", "mpeg2video", ".ts", {"bf": "2"})
    yield Case("mpeg2 B-frames", "mpeg2video", ".mpg", {"bf": "2"})
    for suffix in (".avi", ".mov"):
        yield Case("mjpeg", "mjpeg", suffix, {"qmin": "1", "qmax": "2"}, pixels="yuvj420p")
    yield Case("ffv1", "ffv1", ".mkv")


def cases() -> list[Case]:
    """All files, and clips of some of them. Names with their suffixes are all different."""
    whole = [*_h264_cases(), *_hevc_cases(), *_other_cases()]
    cut = [case for case in whole if case.name in _CUT_NAMES and case.suffix in (".mp4", ".mkv", ".webm", ".ts")]
    clips = [replace(case, name=f"{case.name}, a clip", clip=(1.05, 3.2)) for case in cut]
    return [replace(case, name=f"{case.name} {case.suffix[1:]}") for case in whole + clips]


_CUT_NAMES = {
    "x264 defaults",
    "x264 open GOP",
    "x264 variable frame rate",
    "x265 defaults",
    "x265 open GOP of 6",
    "x265 two temporal layers",
    "vp9 two passes",
    "vp9 realtime",
    "vp8 realtime",
    "av1",
    "mpeg4 B-frames",
}
