"""Quantizing rows to float8: one program per row. It reads the row twice, the second time from the L1 cache."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch


@triton.jit
def fp8_quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    width,
    x_stride,
    smallest,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row, in blocks of BLOCK columns. Pass 1 finds the scale, pass 2 writes the quantized numbers.

    x (rows, width) with row stride x_stride, out (rows, width) float8, scale (rows,) float32
    smallest  lower bound of the row's maximum;  LARGEST  the largest number of the float8 type
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], 0.0, tl.float32)
    zero = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)  # (BLOCK,)
        largest = tl.maximum(largest, tl.abs(x))
        zero += x * 0.0
    # A maximum ignores NaN. The sum of x * 0 is NaN if the row has a NaN or an infinity, and makes the scale NaN.
    top = tl.maximum(tl.max(largest, 0), smallest) + tl.sum(zero, 0)
    whole = tl.full([], LARGEST, tl.float32)
    # Division rounds to nearest as in PyTorch, so that Triton and PyTorch give the same bits.
    factor = tl.div_rn(whole, top)
    tl.store(scale_ptr + row, tl.div_rn(top, whole))
    for start in range(0, width, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)  # (BLOCK,)
        tl.store(out_ptr + row * width + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < width)


def tiles(width: int) -> Launch:
    """Columns per block, and warps."""
    block = min(4096, max(128, triton.next_power_of_2(width)))
    return dict(BLOCK=block, num_warps=max(1, block // 512))


def quantize_rows(x: Tensor, dtype: torch.dtype, smallest: float) -> tuple[Tensor, Tensor]:
    """`pite_kernels.fp8.quantize_rows` of x (n, k) with unit last stride, to a float8 dtype."""
    count, width = x.shape
    out = torch.empty(count, width, dtype=dtype, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        fp8_quantize_rows_kernel[(count,)](
            x, out, scales, width, x.stride(0), smallest, LARGEST=torch.finfo(dtype).max, **tiles(width), **FUSION
        )
    return out, scales
