"""Whether all decoders give the frames that ffmpeg's command line shows: `python -m bench.frames`.

Small files of every codec, group of pictures, container and clip that they may meet (`bench.frame_cases`) are written and
decoded: by PyAV and torchcodec exactly, by DALI on the CPU up to its interpolation of colour, each of all packets and of the
needed ones alone. Without ffmpeg on the PATH, or `imageio-ffmpeg`, the frames are those of libav through a plain loop.

How DALI counts frames on a GPU is simulated (`bench.dali_model`): it must not get a file there of which it would take others.

The exit status is 1 if any frame differs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from bench.dali_model import counts_right
from bench.frame_cases import Case, cases
from bench.media import link_ffmpeg
from dataloaders.decode.bitstream.thinning import needed
from dataloaders.decode.dali.request import DecodeRequest, prepare
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.sampling import frame_indices
from dataloaders.decode.video import probe, sample_video
from dataloaders.records import Media

NUM_FRAMES = (7, 12)
PREPROCESS = Preprocess(64, 64)
LARGEST = 3.0
"""Mean difference, of 255, where colour is interpolated in another way."""

DECODERS = ("pyav", "torchcodec", "dali")
Decoder = Literal["pyav", "torchcodec", "dali"]


@lru_cache
def ffmpeg() -> str | None:
    """Path of ffmpeg's command line, from the PATH or from the package imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    return str(imageio_ffmpeg.get_ffmpeg_exe())


def shown(path: Path) -> np.ndarray:
    """Every frame of a video, (n, H, W, 3) uint8: libav's in a plain loop, whose planes must be those of the command line.

    Raises ValueError where they are not.
    """
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
    if ffmpeg() and b"".join(map(_planes, frames)) != _by_command_line(path, frames[0].format.name):
        raise ValueError(f"{path}: ffmpeg's command line gives other frames than a plain loop")
    reformatter = VideoReformatter()
    return np.stack([reformatter.reformat(frame, format="rgb24").to_ndarray() for frame in frames])


def _planes(frame: av.VideoFrame) -> bytes:
    """The planes of a frame without the padding of their rows."""
    size = -(-frame.format.components[0].bits // 8)
    rows = [np.frombuffer(bytes(p), np.uint8).reshape(p.height, -1)[:, : p.width * size] for p in frame.planes]
    return b"".join(row.tobytes() for row in rows)


def _by_command_line(path: Path, pixels: str) -> bytes:
    """The planes of all frames, in their own format."""
    command = [str(ffmpeg()), "-v", "error", "-noautorotate", "-i", str(path), "-map", "0:v:0"]
    command += ["-fps_mode", "passthrough", "-pix_fmt", pixels, "-f", "rawvideo", "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def differences(case: Case, path: Path, decoders: Sequence[str] = DECODERS) -> list[str]:
    """How the decoders' frames of a file differ from those that are shown; empty if they do not."""
    try:
        every = shown(path)
    except ValueError as error:
        return [str(error)]
    inside = [i for i in range(len(every)) if case.clip is None or case.clip[0] <= case.time(i) < case.clip[1]]
    found = []
    for num_frames in NUM_FRAMES:
        wanted = np.array(inside)[frame_indices(len(inside), num_frames)]
        for decoder in decoders:
            for thinned in (True, False):
                problem = _difference(case, path, every, wanted, decoder, thinned)
                if problem:
                    found.append(f"{decoder}{', needed packets' * thinned}, {num_frames} frames: {problem}")
    return found


def _difference(case: Case, path: Path, every: np.ndarray, wanted: np.ndarray, decoder: str, thinned: bool) -> str:
    if decoder == "dali":
        return _of_dali(case, path, every, wanted, thinned)
    if decoder == "torchcodec":
        from dataloaders.decode.torchcodec import sample_video as sample
    else:
        sample = sample_video
    frames = np.stack(sample(path, len(wanted), case.clip, thinned=thinned).frames)
    if np.array_equal(frames, every[wanted]):
        return ""
    same_size = frames.shape == every[wanted].shape
    if decoder == "torchcodec" and case.interpolated and same_size:
        # swscale interpolates the colour of odd sizes and of more than 8 bits differently in the two.
        distances = np.abs(frames[:, None].astype(np.int16) - every[None]).mean((2, 3, 4))
        return "" if _nearest(distances, wanted) else "other frames"
    return f"frames {[int(w) for w, a in zip(wanted, frames) if not np.array_equal(a, every[w])]} differ"


def _nearest(distances: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether each frame is most like the wanted one, and close to it."""
    at = distances[np.arange(len(wanted)), wanted]
    return bool((at <= distances.min(1) + 1e-6).all() and at.max() < LARGEST)


def _of_dali(case: Case, path: Path, every: np.ndarray, wanted: np.ndarray, thinned: bool) -> str:
    from dataloaders.decode.dali.pipeline import Pipeline

    request = prepare(Media("k", path, clip=case.clip), len(wanted), PREPROCESS, "cpu")
    if not isinstance(request, DecodeRequest):
        return ""  # DALI does not get it.
    if not thinned:
        request = replace(request, content=path.read_bytes(), indices=np.unique(wanted))
    pipeline = Pipeline("video", PREPROCESS, "cpu", 1, 1)
    pipeline.start([request])
    (frames,) = pipeline.finish([request], 60)
    cropped = np.stack([PREPROCESS.cropped(frame) for frame in every])
    ours = np.asarray(frames)[request.places]
    distances = np.abs(ours[:, None].astype(np.int16) - cropped[None]).mean((2, 3, 4))
    return "" if _nearest(distances, wanted) else f"frames {distances.argmin(1).tolist()} instead of {wanted.tolist()}"


def misses_of_the_model(case: Case, folder: Path) -> tuple[bool, bool]:
    """Whether DALI on a GPU would take other frames of the file as it is, by its model, and of the file that it gets."""
    # Twice as large, since NVDEC refuses small sizes.
    path = replace(case, size=(2 * case.size[0], 2 * case.size[1])).write(folder, ffmpeg())
    request = prepare(Media("k", path, clip=case.clip), NUM_FRAMES[0], PREPROCESS, "cuda")
    gets = isinstance(request, DecodeRequest) and not counts_right(request.content, request.indices)
    return not counts_right(path.read_bytes()), gets


def share_kept(path: Path, num_frames: int) -> float:
    """Share of the packets of a video that N frames need; 1 where the headers do not prove which."""
    probed = probe(path)
    if not probed.packets.thinnable:
        return 1.0
    wanted = probed.packets.ticks(probed.indices(num_frames) - probed.first)
    return float(needed(probed.packets.pictures, wanted).kept.mean())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.frames", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=list(DECODERS))
    options = parser.parse_args(arguments)
    bad = files = counted_wrongly = 0
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases():
            if options.only not in case.name or (case.needs_ffmpeg and ffmpeg() is None):
                continue
            path = case.write(Path(temporary), ffmpeg())
            problems = differences(case, path, options.decoders)
            (large := Path(temporary) / "large").mkdir(exist_ok=True)
            as_it_is, as_it_gets = misses_of_the_model(case, large)
            problems += ["DALI on a GPU would get it and take other frames"] * as_it_gets
            counted_wrongly += as_it_is
            files, bad = files + 1, bad + bool(problems)
            print(
                f"{case.name:40} {share_kept(path, 7):4.0%} of the packets  {'; '.join(problems) or 'equal'}",
                flush=True,
            )
    print(f"{files - bad} of {files} files are equal; frames shown by {ffmpeg() or 'libav'}")
    print(f"DALI's model takes other frames of {counted_wrongly} files as they are")
    return int(bad > 0)


def with_libraries() -> None:
    """Start again with PyAV's FFmpeg libraries where torchcodec finds them."""
    if "PITE_FRAMES_LINKED" in os.environ:
        return
    with tempfile.TemporaryDirectory() as links:
        link_ffmpeg(Path(links))
        environment = {**os.environ, "LD_LIBRARY_PATH": links, "PITE_FRAMES_LINKED": "1"}
        sys.exit(subprocess.run([sys.executable, "-m", "bench.frames", *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    with_libraries()
    sys.exit(main())
