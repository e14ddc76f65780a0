"""The decoder's elementwise ops: liger-kernel's Triton kernels on CUDA if installed, PyTorch everywhere else.

These ops are memory-bound, and liger-kernel is fast. This file adds the packed (T, ...) shape and one set of names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pite_kernels import reference

log = logging.getLogger(__name__)

_LIGER = (
    "LigerFusedAddRMSNormFunction",
    "LigerRMSNormFunction",
    "LigerRopeFunction",
    "LigerFusedGateUpSiLUMulFunction",
    "LigerSiLUMulFunction",
)


@lru_cache
def _liger() -> ModuleType | None:
    try:
        liger = import_module("liger_kernel.ops")
    except ImportError:
        log.warning(
            "pite_kernels: liger-kernel is not installed; norms and SwiGLU run in PyTorch, with more time and memory."
        )
        return None
    missing = [name for name in _LIGER if not hasattr(liger, name)]
    if missing:
        log.warning(
            "pite_kernels: this liger-kernel has no %s; install 0.8.2 or later. PyTorch is used instead.",
            ", ".join(missing),
        )
        return None
    return liger


def _liger_for(x: Tensor) -> ModuleType | None:
    # Its launches go to the current device, so callers make x's device current. Autograd does so for backward passes.
    # torch.compile fuses the plain version with the ops around it.
    if torch.compiler.is_compiling():
        return None
    return _liger() if x.is_cuda and x.dtype != torch.float64 else None


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = ..., residual: None = ...) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = ..., residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm with statistics in float32 (Zhang & Sennrich 2019; rounded as in Llama).

    x, residual  (..., d);  weight (d,)
    Returns weight * x / sqrt(mean(x^2) + eps), (..., d). With a residual: the norm of x + residual, and that sum.
    """
    liger = _liger_for(x)
    if liger is not None:
        with torch.cuda.device_of(x):
            if residual is not None:
                return liger.LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)
            return liger.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
    if x.dtype not in (torch.float32, torch.float64):
        return reference.rms_norm(x, weight, eps=eps, residual=residual)
    total = x if residual is None else x + residual
    normed = F.rms_norm(total, weight.shape, weight, eps)
    return normed if residual is None else (normed, total)


def rope_tables(
    position_ids: Tensor,
    head_dim: int,
    *,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding (Su et al. 2021), half-split as in Llama. Compute them once per step.

    position_ids  (T,) integers, restarting at 0 for each packed document; with sections (A, T): a token's time, row and
                  column (M-RoPE, Qwen2-VL, arXiv 2409.12191)
    sections      numbers of frequencies that rotate by each of the A axes, head_dim / 2 together (`mrope_section`)
    interleaved   the axes take turns, as in Qwen3-VL; else each has consecutive frequencies, as in Qwen2-VL and Qwen2.5-VL
    Returns cos and sin, (T, head_dim) each, in `dtype`; the angles are computed in float32. Raises ValueError on shapes
    that do not fit.
    """
    if head_dim % 2:
        raise ValueError(f"rope_tables: head_dim must be even, not {head_dim}")
    axes = None if sections is None else len(sections)
    if sections is not None and (2 * sum(sections) != head_dim or min(sections) < 0):
        raise ValueError(f"rope_tables: the sections {list(sections)} must add up to {head_dim // 2}, half of head_dim")
    if interleaved and sections is not None and len(sections) * max(sections[1:], default=0) > sum(sections):
        raise ValueError(f"rope_tables: the sections {list(sections)} cannot take turns: the first must be the largest")
    if position_ids.dim() != (1 if axes is None else 2) or (axes is not None and len(position_ids) != axes):
        expected = "(T,)" if axes is None else f"({axes}, T)"
        raise ValueError(f"rope_tables: position_ids must be {expected}, not {tuple(position_ids.shape)}")
    return reference.rope_tables(
        position_ids, head_dim, theta=theta, dtype=dtype, sections=sections, interleaved=interleaved
    )


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate packed queries and keys by their positions.

    q (T, H, D), k (T, K, D);  cos, sin (T, D) from `rope_tables`
    Returns the rotated q (T, H, D) and k (T, K, D).
    """
    liger = _liger_for(q)
    if liger is not None:
        # liger rotates in place, in the layout (1, heads, T, D); the copies leave the caller's tensors unchanged.
        q4, k4 = (t.clone(memory_format=torch.contiguous_format).transpose(0, 1)[None] for t in (q, k))
        with torch.cuda.device_of(q):
            q4, k4 = liger.LigerRopeFunction.apply(q4, k4, cos[None], sin[None])
        return q4[0].transpose(0, 1), k4[0].transpose(0, 1)
    return reference.apply_rope(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020).

    gate, up  (..., d) each; or gate only, (..., 2d): the output of the fused projection, gate first
    """
    liger = _liger_for(gate)
    if up is None:
        if liger is not None:
            with torch.cuda.device_of(gate):
                return liger.LigerFusedGateUpSiLUMulFunction.apply(gate)
        gate, up = gate.chunk(2, -1)
    elif liger is not None:
        with torch.cuda.device_of(gate):
            return liger.LigerSiLUMulFunction.apply(gate, up)
    return reference.swiglu(gate, up)
