"""Quantising rows to float8: one block to a row, which it reads twice, the second time from the first-level cache."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    width,
    x_stride,
    smallest,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], 0.0, tl.float32)
    zero = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        zero += x * 0.0
    # A maximum passes over NaN. This zero is NaN where the row has one, or an infinity: so is then the scale.
    top = tl.maximum(tl.max(largest, 0), smallest) + tl.sum(zero, 0)
    whole = tl.full([], LARGEST, tl.float32)
    # Rounded as PyTorch rounds: both back ends make the same bits.
    factor = tl.div_rn(whole, top)
    tl.store(scale_ptr + row, tl.div_rn(top, whole))
    for start in range(0, width, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * width + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < width)


def tiles(width: int) -> Launch:
    """Numbers of a row at once, and warps."""
    block = min(4096, max(128, triton.next_power_of_2(width)))
    return dict(BLOCK=block, num_warps=max(1, block // 512))


def quantize_rows(x: Tensor, dtype: torch.dtype, smallest: float) -> tuple[Tensor, Tensor]:
    """`pite_kernels.fp8.quantize_rows` of x (n, k) with unit last stride, to a float8 dtype."""
    count, width = x.shape
    out = torch.empty(count, width, dtype=dtype, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        quantize_rows_kernel[(count,)](
            x, out, scales, width, x.stride(0), smallest, LARGEST=torch.finfo(dtype).max, **tiles(width), **FUSION
        )
    return out, scales
