"""Flags that commands share, and the form of a device's name. Nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dataloaders.logs import LogFlags


@dataclass(frozen=True, kw_only=True)
class DeviceFlags(LogFlags):
    """Flags of a command that runs a model."""

    device: str = "auto"
    """cpu, cuda, or one GPU of several as cuda:1; auto is a GPU if there is one"""

    def __post_init__(self) -> None:
        check_device_name(self.device)


def check_device_name(name: str) -> None:
    """Raise ValueError for anything but `auto`, `cpu`, `cuda` and `cuda:1`."""
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d*))?", name):
        raise ValueError(f"device {name!r} is unknown: give cpu, cuda, one GPU of several as cuda:1, or auto")
