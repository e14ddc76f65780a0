"""Encoding: `python -m bench.encode` times files to features on this machine's GPU, in one call from the source tree.

  NVDEC       whether the driver's video decoding library can be loaded
  decode      files of 52 s, 100 frames of each resized and cropped: DALI and PyAV with all cores. For comparison
              PyNvVideoCodec, which decodes every frame without resizing or copying it
  CLIP        ViT-L/14 with random weights: ours, ours with the last layer for every token, and transformers'
  encode      engine.encode, from files (in the page cache) to stored features
  projection  PiTe-143k on 8 A100s, from these measurements and the data sheets of the devices

A measurement that fails is a row with the reason. `--device cpu` is for trying the script on small amounts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.clip import OURS, ClipRow, measure, save_vit_l
from bench.measure import environment
from bench.media import FRAMES, write_video
from dataloaders.cpu import available_cores
from dataloaders.decode.dali.decoder import DaliDecoder
from dataloaders.decode.decoder import DecodePool, Decoder, decode_cropped
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media
from engine.encode.config import EncodeConfig
from engine.encode.run import encode
from engine.hardware import DEVICES
from pite.clip import ClipEncoder

RESULTS = Path(__file__).parent / "results"
BARE, DALI, PYAV = "PyNvVideoCodec, all frames, left as decoded", "DALI", "PyAV"
N = 100
VIDEOS = 143_640
"""Number of videos of PiTe-143k. Files here have 52 s at 30 frames/s, the mean of that data set."""

ENGINES = {"A100": 5, "H100": 7, "H200": 7}
"""Number of NVDEC engines, from NVIDIA's table of video decoders."""


@dataclass(frozen=True)
class Row:
    """Rates of one implementation: median, slowest and fastest round; or `problem`, the reason for no numbers.

    frames_per_second  counts all frames of the files, not only those that are kept
    share_of_bare      fraction of PyNvVideoCodec's rate for the same files
    """

    case: str
    implementation: str
    frames_per_second: float | None = None
    slow: float | None = None
    fast: float | None = None
    share_of_bare: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Amounts:
    """Size of the measurement: files of each kind, rounds, frames per CLIP forward pass, frames encoded per video."""

    files: int
    rounds: int
    batch: int
    num_frames: int
    kinds: tuple[tuple[str, str], ...]


GPU = Amounts(48, 3, 200, N, (("H.264", "360p"), ("H.264", "720p"), ("VP9", "360p"), ("VP9", "720p")))
CPU = Amounts(2, 1, 1, 1, (("H.264", "360p"), ("VP9", "360p")))


def nvdec() -> str:
    """Whether the driver's decoding library can be loaded; some containers do not have it."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError as error:
        return f"not available: {error}"
    return "libnvcuvid.so.1 loads"


def rates(decode: Callable[[], None], frames: int, rounds: int) -> tuple[float, float, float]:
    """Frames per second of the median, slowest and fastest round."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        decode()
        seconds.append(time.perf_counter() - begin)
    return frames / median(seconds), frames / max(seconds), frames / min(seconds)


def decode_all(decoder: Decoder, media: Sequence[Media], expected: str) -> None:
    """Raises ValueError if a file is not decoded, or is decoded by another back end than `expected`."""
    for decoded in decoder.map(media):
        if decoded.frames is None or not decoded.by.startswith(expected):
            raise ValueError(decoded.reason or f"decoded by {decoded.by}")


def bare_decode(paths: Sequence[Path]) -> None:
    """Decode every frame of every file, as many files at a time as a GPU can have NVDEC engines."""
    import PyNvVideoCodec

    def frames_of(path: Path) -> int:
        demuxer = PyNvVideoCodec.CreateDemuxer(filename=str(path))
        decoder = PyNvVideoCodec.CreateDecoder(gpuid=0, codec=demuxer.GetNvCodecId(), usedevicememory=True)
        return sum(len(decoder.Decode(packet)) for packet in demuxer)

    with ThreadPoolExecutor(max(ENGINES.values())) as threads:
        counts = set(threads.map(frames_of, paths))
    if not 0.99 * FRAMES <= min(counts) <= max(counts) <= FRAMES:  # It may drop the last few.
        raise ValueError(f"it decoded {min(counts)} to {max(counts)} frames of {FRAMES}")


def measure_decoding(kind: str, paths: Sequence[Path], device: str, rounds: int) -> list[Row]:
    """Time every decoder on files of one kind."""
    media, frames, cores = [Media(p.stem, p) for p in paths], FRAMES * len(paths), available_cores()
    cropped = partial(decode_cropped, num_frames=N, preprocess=Preprocess())
    makers: dict[str, Callable[[], AbstractContextManager[Decoder]]] = {
        DALI: lambda: DaliDecoder("video", N, Preprocess(), device, workers=cores),
        PYAV: lambda: DecodePool(cropped, cores),
    }
    rows = []
    try:
        rows.append(Row(kind, BARE, *rates(partial(bare_decode, paths), frames, rounds)))
    except Exception as error:
        rows.append(_failed(kind, BARE, error))
    bare = rows[0].frames_per_second
    for name, make in makers.items():
        try:
            with make() as decoder:
                decode_all(decoder, media[:1], name)  # Warm-up: processes start, codecs are compared.
                row = Row(kind, name, *rates(partial(decode_all, decoder, media, name), frames, rounds))
            assert row.frames_per_second is not None
            rows.append(row if bare is None else replace(row, share_of_bare=row.frames_per_second / bare))
        except Exception as error:  # One failure must not stop the others.
            rows.append(_failed(kind, name, error))
    return rows


def _failed(case: str, implementation: str, error: Exception) -> Row:
    return Row(case, implementation, problem=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def measure_encoding(clip: Path, paths: Sequence[Path], folder: Path, amounts: Amounts, device: str) -> Row:
    """Time engine.encode on links to `paths`.

    The rate is that of the difference between two runs, which excludes the start-up. A run before fills the caches.
    """
    seconds, few = [], max(1, len(paths) // 8)
    try:
        for run, count in enumerate((few, few, len(paths))):
            data = folder / f"data{run}"
            (data / "stage2/videos").mkdir(parents=True)
            for path in paths[:count]:
                os.link(path, data / "stage2/videos" / path.name)
            records = [{"id": p.stem, "conversations": [], "meta": {}} for p in paths[:count]]
            (data / "stage2/pite_143k.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
            config = EncodeConfig(
                data=data,
                store=folder / f"store{run}",
                clip=str(clip),
                num_frames=amounts.num_frames,
                batch_size=amounts.batch,
                device="cuda" if device == "cuda" else "cpu",
            )
            begin = time.perf_counter()
            done = encode(config)
            seconds.append(time.perf_counter() - begin)
            if done.failed or done.encoded != count:
                raise ValueError(f"{done.encoded} of {count} videos were encoded")
        if seconds[2] <= seconds[1]:
            raise ValueError(f"{len(paths)} files took no longer than {few}: too few to measure; use more")
    except Exception as error:
        return _failed("encode", "engine.encode", error)
    rate = FRAMES * (len(paths) - few) / (seconds[2] - seconds[1])
    return Row("encode", f"engine.encode, {amounts.num_frames} frames of each file, {rate / FRAMES:.2f} videos/s", rate)


def projection(device: str, decode: Sequence[Row], clip: Sequence[ClipRow]) -> dict[str, float] | None:
    """Hours that PiTe-143k takes on 8 A100s, with decoding and CLIP overlapped.

    Assumes that CLIP reaches the same fraction of the peak, and an NVDEC engine the same frames per second, as on this
    GPU. None if the GPU is unknown or one of the two was not measured.
    """
    here = next((name for name in ENGINES if name in device), None)
    dali = [r.frames_per_second for r in decode if r.implementation == DALI and r.frames_per_second is not None]
    ours = next((r for r in clip if r.implementation == OURS and r.frames_per_second is not None), None)
    if here is None or not dali or ours is None or ours.frames_per_second is None:
        return None
    peaks = {name.partition("-")[0]: known.peak for name, known in DEVICES.items()}
    clip_videos = ours.frames_per_second / N * peaks["A100"] / peaks[here]
    decoded_videos = min(dali) / FRAMES * ENGINES["A100"] / ENGINES[here]
    hours = [VIDEOS / (8 * rate) / 3600 for rate in (clip_videos, decoded_videos)]
    return {"clip_hours": hours[0], "decode_hours": hours[1], "hours": max(hours)}


def table(content: Mapping[str, Any]) -> str:
    """A result file as Markdown."""
    lines = [f"| encoding, {content['environment']['device']} | frames/s | share |", "|---|---|---|"]
    for row in content["decode"] + content["clip"] + content["encode"]:
        name = f"{row['case']}: {row['implementation']}" if "case" in row else f"CLIP: {row['implementation']}"
        if row["frames_per_second"] is None:
            lines.append(f"| {name} | {row['problem']} | |")
            continue
        rate, slow, fast = (None if row[k] is None else _three(row[k]) for k in ("frames_per_second", "slow", "fast"))
        spread = "" if slow is None else f" ({slow} to {fast})"
        bare, mfu = row.get("share_of_bare"), row.get("mfu")
        share = (
            f"{bare:.0%} of the bare rate" if bare is not None else f"{mfu:.0%} of the peak" if mfu is not None else ""
        )
        lines.append(f"| {name} | {rate}{spread} | {share} |")
    if content["projection"]:
        hours = content["projection"]
        lines.append(
            f"| PiTe-143k on 8 A100s, projected | {hours['hours']:.2f} h: CLIP {hours['clip_hours']:.2f} h, "
            f"decoding {hours['decode_hours']:.2f} h | |"
        )
    return "\n".join(lines)


def _three(value: float) -> str:
    """Three significant digits; all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model; default: ViT-L/14 with random weights")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of the random CLIP: 224 (PiTe) or 336")
    parser.add_argument("--output", type=Path, help="result file; default: bench/results/encode_<device>.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; use --device cpu to try the script on small amounts")
    amounts, device = (GPU, torch.device("cuda:0")) if options.device == "cuda" else (CPU, torch.device("cpu"))
    described = environment(device)
    content: dict[str, Any] = {"environment": described, "decode": [], "clip": [], "encode": [], "projection": None}
    content["nvdec"] = nvdec()
    path = options.output or RESULTS / f"encode_{described['device'].split(',')[0].replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:  # Called after every part, so that results survive the loss of the machine.
        path.write_text(json.dumps(content, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        folder = Path(temporary)
        decoded: list[Row] = []
        videos: list[Path] = []
        for kind in amounts.kinds:
            first = write_video(folder / "-".join(kind), *kind)
            paths = [first.with_name(f"{'-'.join(kind)}-{i}{first.suffix}") for i in range(amounts.files)]
            for link in paths:
                os.link(first, link)
            videos += paths
            decoded += measure_decoding("-".join(kind), paths, options.device, amounts.rounds)
            content["decode"] = [vars(row) for row in decoded]
            save()
        try:
            clip = options.clip or save_vit_l(folder / "clip", options.image_size)
            encoder = ClipEncoder(str(clip), str(device), compiled=options.device == "cuda")
        except ValueError as error:
            parser.error(str(error))
        rows = measure(encoder, amounts.batch, amounts.rounds)
        content["clip"] = [vars(row) for row in rows]
        del encoder
        save()
        # Reordered, so that the first files have all kinds.
        videos = videos[:: amounts.files] + [v for i, v in enumerate(videos) if i % amounts.files]
        content["encode"] = [vars(measure_encoding(clip, videos, folder, amounts, options.device))]
    content["projection"] = projection(described["device"], decoded, rows)
    save()
    print(f"NVDEC: {content['nvdec']}\n{table(content)}\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
