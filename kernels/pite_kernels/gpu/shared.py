"""Small kernels that both losses use: the final reduction of a loss, and zeroing of selected rows."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fusing a multiply and an add changes bits, and Triton releases differ in the default, so it is set explicitly.
FUSION = {"enable_fp_fusion": True}


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 on a CPU (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["count"])
def finish_loss_kernel(partial_ptr, normalizer_ptr, loss_ptr, scale_ptr, ok_ptr, count, BLOCK: tl.constexpr):
    """One program in all: sums the three rows of `partial` in a fixed order.

    partial (3, count) float32: losses, numbers counted, invalid numbers;  normalizer 0-dim, or None: the sum counted
    Writes loss = total / normalizer and scale = 1 / normalizer (0-dim float32), ok = 1 if all are valid (0-dim int32).
    """
    total = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.int64)
    invalid = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keep = at < count
        total += tl.load(partial_ptr + at, mask=keep, other=0.0)  # (BLOCK,)
        counted += tl.load(partial_ptr + count + at, mask=keep, other=0.0).to(tl.int64)  # (BLOCK,)
        invalid += tl.load(partial_ptr + 2 * count + at, mask=keep, other=0.0)  # (BLOCK,)
    normalizer = tl.sum(counted).to(tl.float32)
    if normalizer_ptr is not None:
        normalizer = tl.load(normalizer_ptr).to(tl.float32)  # scalar
    scale = tl.where(normalizer == 0.0, 0.0, 1.0 / normalizer)
    tl.store(scale_ptr, scale)
    tl.store(loss_ptr, tl.sum(total) * scale)
    tl.store(ok_ptr, (tl.sum(invalid) == 0.0).to(tl.int32))


def finish_loss(partial: Tensor, normalizer: Tensor | None, message: str) -> tuple[Tensor, Tensor]:
    """(loss, scale = 1 / normalizer) from partial (3, n) float32: losses, numbers counted, invalid numbers.

    An invalid number triggers a device-side assert with `message`.
    """
    loss, scale = partial.new_empty(()), partial.new_empty(())
    ok = partial.new_empty((), dtype=torch.int32)
    finish_loss_kernel[(1,)](partial, normalizer, loss, scale, ok, partial.shape[1], BLOCK=1024, num_warps=4, **FUSION)
    torch._assert_async(ok, message)
    return loss, scale


@triton.jit(do_not_specialize=["key"])
def zero_rows_kernel(out_ptr, key_ptr, key, depth, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row of out (rows, depth), zeroed where keys (rows,) equals `key`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = tl.where(tl.load(key_ptr + row) == key, depth, 0)  # scalar: the columns to zero
    zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * depth + column, zeros, mask=column < width)


def zero_rows(out: Tensor, keys: Tensor, key: int) -> None:
    """Zero the rows of a contiguous (n, d) tensor whose entry in `keys` (n,) equals `key`."""
    rows, depth = out.shape
    if rows:
        zero_rows_kernel[(rows, triton.cdiv(depth, 2048))](out, keys, key, depth, BLOCK=2048, num_warps=4, **FUSION)


def tile_of(width: int, largest: int) -> int:
    """The smallest power of two from `width` up, within [16, largest]."""
    return max(16, min(largest, triton.next_power_of_2(width)))


Launch = dict[str, Any]
