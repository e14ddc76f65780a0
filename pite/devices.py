"""The inference device: selected by name, and checked before anything is loaded."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from dataloaders.errors import reason
from pite.flags import check_device_name

log = logging.getLogger(__name__)


def resolve(name: str) -> torch.device:
    """The device `cpu`, `cuda` or `cuda:1`; `auto` is a GPU if there is one.

    Raises ValueError (one sentence) for a device that does not exist.
    """
    check_device_name(name)
    if name == "auto":
        if fault := unusable_gpu():
            log.warning("%s; using the CPU", fault)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} cannot be used: {unusable_gpu() or 'torch finds no GPU here'}; give cpu")
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


def unusable_gpu() -> str | None:
    """Why torch cannot use the NVIDIA GPU of this machine; None if it can, or if there is no GPU."""
    if torch.cuda.is_available():
        return None
    driver = _driver()
    if driver is None:
        return None
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is a build without CUDA (docs/install.md)"
        )
    return (
        f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: it is built for CUDA "
        f"{torch.version.cuda}, and the driver is {driver} (docs/install.md has the driver that each build needs)"
    )


def check_computes(device: torch.device) -> None:
    """Raise ValueError if a GPU cannot run torch's kernels, such as one that is newer or older than the build."""
    try:
        (torch.zeros(1, device=device) + 1).item()
    except RuntimeError as error:
        raise ValueError(
            f"{device} cannot be used by torch {torch.__version__}: {reason(error)} (docs/install.md lists the builds)"
        ) from None


def _driver() -> str | None:
    """Version of the loaded NVIDIA driver, or None."""
    try:
        return _driver_of(Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None


def _driver_of(text: str) -> str:
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"
