"""The optional C++ library kernels/_C*.so: loaded once, and only missed where it would have been faster."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@lru_cache
def _library() -> Any | None:
    """The registered operators, or None; PITE_KERNELS_CPP=0 in the environment leaves the library unloaded."""
    if os.environ.get("PITE_KERNELS_CPP", "1") == "0":
        return None
    for path in sorted(Path(__file__).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(path)
            return torch.ops.pite_kernels_cpu
        except OSError as error:
            log.warning(
                "kernels: %s does not load (%s); rebuild it with setup.py. PyTorch serves instead.", path, error
            )
    return None


def cpp(tensor: Tensor) -> Any | None:
    """The C++ operators where they serve `tensor` (float32 on the CPU with unit last stride), else None."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.stride(-1) != 1:
        return None
    return _library()
