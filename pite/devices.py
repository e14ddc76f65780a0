"""The inference device: selected by name, and checked before anything is loaded."""

from __future__ import annotations

import re

import torch


def resolve(name: str) -> torch.device:
    """The device `cpu`, `cuda` or `cuda:1`. Raises ValueError (one sentence) for a device that does not exist."""
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d*))?", name):
        raise ValueError(f"device {name!r} is unknown: give cpu, cuda, or one GPU of several as cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} cannot be used: torch finds no GPU here; give cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} cannot be used: the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    return torch.device(name)


def select(name: str) -> None:
    """Check the device of a command line; if it has an index (`cuda:1`), make that GPU the current one."""
    device = resolve(name)
    if device.index is not None:
        torch.cuda.set_device(device)


def dtype(device: torch.device) -> torch.dtype:
    """The dtype in which models are loaded: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def default() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
