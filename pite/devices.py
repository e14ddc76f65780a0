"""The inference device: selected by name, and checked before anything is loaded."""

from __future__ import annotations

import logging

import torch

from pite.flags import check_device_name

log = logging.getLogger(__name__)


def resolve(name: str) -> torch.device:
    """The device `cpu`, `cuda` or `cuda:1`; `auto` is a GPU if there is one.

    Raises ValueError (one sentence) for a device that does not exist.
    """
    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} cannot be used: torch finds no GPU here; give cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} cannot be used: the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    return torch.device(name)


def select(name: str) -> str:
    """Check the device of a command line, log it, and return its name; `cuda:1` becomes the current GPU."""
    device = resolve(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    found = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    log.info("device %s (%s), %s", device, found, str(dtype(device)).removeprefix("torch."))
    return str(device)


def dtype(device: torch.device) -> torch.dtype:
    """The dtype in which models are loaded: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
