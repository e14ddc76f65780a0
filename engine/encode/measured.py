"""Hours of encoding on eight GPUs: from the measurements of `bench.encode` where there are any, else from data sheets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dataloaders.decode.dali.sessions import ENGINES

FRAME_RATE = 30
"""Frames per second of a video, assumed."""

ENGINE_RATE = 1735.0
"""Frames/s of 720p H.264 that an NVDEC engine is assumed to decode: NVIDIA's 771 of 1080p, by pixels."""

GPUS = 8


@dataclass(frozen=True)
class Rates:
    """Frames/s of one GPU; None where bench/results holds no measurement."""

    clip: float | None = None
    decode: float | None = None


def measured_rates(device: str, results: Path) -> Rates:
    """The best rates in the files encode_*.json of bench/results or its folders, for a device such as "A100-80GB".

    Decoding is that of files of several kinds ("mixed") where they were measured.
    """
    clip: list[float] = []
    decode: dict[bool, list[float]] = {True: [], False: []}
    for file in sorted([*results.glob("encode_*.json"), *results.glob("*/encode_*.json")]):
        content = json.loads(file.read_text())
        if f" {device.partition('-')[0]}" not in content["environment"]["device"]:
            continue
        clip += [r["frames_per_second"] for r in content["clip"] if r["implementation"] == "pite" and not r["problem"]]
        for row in content["decode"]:
            if row["sessions"] and row["frames_per_second"]:
                decode[row["case"] == "mixed"].append(row["frames_per_second"])
    best = decode[True] or decode[False]
    return Rates(max(clip, default=None), max(best, default=None))


def hours_on(device: str, rates: Rates, frames: float, seconds: float, assumed_clip: float) -> str:
    """A line on the hours that eight GPUs take.

    frames        that CLIP encodes
    seconds       of video to decode; 0 for stills
    assumed_clip  frames/s of CLIP on one of them, where none was measured
    """
    clip = frames / (rates.clip or assumed_clip) / GPUS / 3600
    parts = [f"CLIP {clip:,.3f} h ({_origin(rates.clip, 'a share of the peak')})"]
    if seconds:
        engines = ENGINES[device.partition("-")[0]]
        decode = seconds * FRAME_RATE / (rates.decode or engines * ENGINE_RATE) / GPUS / 3600
        parts.append(f"decoding {decode:,.3f} h ({_origin(rates.decode, f'{engines} NVDEC engines on 720p')})")
    return f"  8x {device:<9} {', '.join(parts)}; the two overlap"


def _origin(rate: float | None, assumption: str) -> str:
    return f"assumed, not measured: {assumption}" if rate is None else f"measured: {rate:,.0f} frames/s a GPU"
