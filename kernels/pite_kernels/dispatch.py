"""Dispatch by device: Triton on CUDA, the optional C++ library on the CPU, PyTorch as the fallback everywhere else."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

NAMESPACE = "pite_kernels"
"""Of the operators registered with torch.library."""

OPERATORS = ("trajectory_forward", "trajectory_grad_hidden", "trajectory_grad_weight", "softmax_rows")


@lru_cache
def _library() -> Any | None:
    """The registered operators, or None; PITE_KERNELS_CPP=0 in the environment disables the library."""
    if os.environ.get("PITE_KERNELS_CPP", "1") == "0":
        return None
    for path in sorted(Path(__file__).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(path)
            for name in OPERATORS:
                getattr(torch.ops.pite_kernels_cpu, name)
            return torch.ops.pite_kernels_cpu
        except (OSError, AttributeError) as error:  # not a library for this machine, or one built from older sources
            log.warning(
                "pite_kernels: %s does not load (%s); rebuild it with setup.py. PyTorch is used instead.", path, error
            )
    return None


def cpp(tensor: Tensor) -> Any | None:
    """The C++ operators if they support `tensor` (float32 on the CPU with unit last stride), else None."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.stride(-1) != 1:
        return None
    return _library()


def uses_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels support `tensor`; float64 is computed by PyTorch."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """What computes the losses of hidden states on `device` in `dtype`: "Triton", "C++" or "PyTorch"."""
    sample = torch.empty(0, device=device, dtype=dtype)
    if uses_triton(sample):
        return "Triton"
    return "PyTorch" if cpp(sample) is None else "C++"


def with_unit_stride(hidden: Tensor) -> Tensor:
    """`hidden` itself if its last dimension has stride 1, else a contiguous copy."""
    return hidden if hidden.stride(-1) == 1 else hidden.contiguous()


def autocast(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of `torch.autocast` where that is on for its device; float64 stays, as in PyTorch."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def without_autocast(function: F) -> F:
    """The body of an operator, run with `torch.autocast` off: it chooses its dtypes itself, in backward too.

    Autocast would cast the factors of `torch.mm`, but not those of `addmm_` or of `out=`.
    """

    @functools.wraps(function)
    def body(first: Tensor, *rest: Any, **options: Any) -> Any:
        kind = first.device.type
        if not torch.is_autocast_enabled(kind):
            return function(first, *rest, **options)
        with torch.autocast(kind, enabled=False):
            return function(first, *rest, **options)

    return body  # type: ignore[return-value]
