"""Where inference runs: a device by name, checked before anything is loaded onto it."""

from __future__ import annotations

import re

import torch


def resolve(name: str) -> torch.device:
    """The device `cpu`, `cuda` or `cuda:1`. Raises ValueError, one sentence, for one that is not here."""
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d*))?", name):
        raise ValueError(f"device {name!r} is unknown: give cpu, cuda, or one GPU of several as cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} cannot be used: torch finds no GPU here; give cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} cannot be used: the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    return torch.device(name)


def take(name: str) -> None:
    """Check a command line's device and, where it says which GPU, have kernels launched on that one."""
    device = resolve(name)
    if device.index is not None:
        torch.cuda.set_device(device)


def dtype(device: torch.device) -> torch.dtype:
    """What models are loaded as there: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def default() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
