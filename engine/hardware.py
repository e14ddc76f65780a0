"""GPUs: numbers of their data sheets, and measurements in bench/results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.distributed.world import World
from engine.layout import count_parameters
from engine.recipes import Recipe
from pite.config import PiTeConfig

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Dense bfloat16 FLOP/s of the data sheet, bytes that PyTorch reports, whether it has float8 arithmetic."""

    peak: float
    bytes: float
    fp8: bool


DEVICES: dict[str, Device] = {
    "A100-40GB": Device(312e12, 39.4 * GIB, False),
    "A100-80GB": Device(312e12, 79.1 * GIB, False),
    "H100": Device(989e12, 79.1 * GIB, True),
    "H200": Device(989e12, 139.7 * GIB, True),
}

_OTHER_PEAKS: dict[str, float] = {" H100 PCIe": 756e12, " H100 NVL": 835e12, " H200 NVL": 835e12}

ASSUMED_MFU = 0.45
"""MFU (4N FLOPs a computed row) assumed for the hours where bench/results holds no measured step."""

ASSUMED_FP8_GAIN = 1.3
"""Assumed speed-up of a step with float8 frozen weights where none was measured: the goal of the project."""

CLIP_MFU = 0.55
"""Assumed share of the bfloat16 peak for CLIP in predictions; a goal until bench/results holds a measurement."""


def peak_of(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None for an unknown one, such as every CPU."""
    return _peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak(name: str) -> float | None:
    known = {**_OTHER_PEAKS, **{" " + device.partition("-")[0]: found.peak for device, found in DEVICES.items()}}
    return next((peak for part, peak in known.items() if part in name), None)


def measured_mfu(size: str, device: str, results: Path, implementation: str = "pite") -> float | None:
    """The best measured MFU for this model and device in the files step_*.json of bench/results or its folders, or None.

    implementation  its name in `bench.step`; for "pite", the whole loop's MFU goes before the bare step's
    """
    kind, _, memory = device.partition("-")
    found: dict[str, list[float]] = {}
    for file in sorted([*results.glob("step_*.json"), *results.glob("*/step_*.json")]):
        content = json.loads(file.read_text())
        name = content["environment"]["device"]
        if f" {kind}" not in name or memory not in name or _peak(name) != DEVICES[device].peak:
            continue
        for row in content.get("rows", ()):
            if row["model"] == size and row.get("mfu"):
                found.setdefault(row["implementation"], []).append(row["mfu"])
    names = ("pite loop", "pite") if implementation == "pite" else (implementation,)
    return next((max(found[name]) for name in names if name in found), None)


def capacity_of(device: torch.device) -> float | None:
    """Bytes of a CUDA device; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def efficiency(config: PiTeConfig, recipe: Recipe, world: World) -> Callable[[float, int, float], dict[str, float]]:
    """A function from a step's rows, supervised tokens and seconds to its MFU and peak memory, where they are known."""
    if world.device.type != "cuda":
        return lambda rows, targets, seconds: {}
    peak, count = peak_of(world.device), count_parameters(config, recipe)

    def measure(rows: float, targets: int, seconds: float) -> dict[str, float]:
        numbers = {"memory_gb": torch.cuda.max_memory_allocated(world.device) / 1e9}
        if peak is not None:
            numbers["mfu"] = count.flops(rows, targets) / seconds / (peak * world.size)
        return numbers

    return measure
