"""Rotary embedding from one strided tensor of heads into another, which may be the same memory.

A block holds some tokens' cosines and sines and turns one head after another by them. Forward rotates the fused q, k, v
projection where it lies; backward turns the gradients back on their way into the fused gradient: neither copies first.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch


@triton.jit
def rotate_kernel(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    count,
    heads,
    half,
    x_row,
    x_head,
    out_row,
    out_head,
    table_row,
    BACK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    keep = (rows < count) & (columns < half)
    cos = tl.load(cos_ptr + rows * table_row + columns, mask=keep, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + rows * table_row + columns, mask=keep, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    first = tl.program_id(1) * GROUP
    for head in range(first, tl.minimum(first + GROUP, heads)):
        x = x_ptr + rows * x_row + head * x_head + columns
        left = tl.load(x, mask=keep, other=0.0).to(tl.float32)
        right = tl.load(x + half, mask=keep, other=0.0).to(tl.float32)
        out = out_ptr + rows * out_row + head * out_head + columns
        tl.store(out, (left * cos - right * sin).to(out_ptr.dtype.element_ty), mask=keep)
        tl.store(out + half, (right * cos + left * sin).to(out_ptr.dtype.element_ty), mask=keep)


def tiles(half: int) -> Launch:
    """Tokens and heads of a block, and warps: 16 bytes to a thread and load in half precision."""
    width = max(16, triton.next_power_of_2(half))
    return dict(GROUP=8, ROWS=max(1, 2048 // width), HALF=width, num_warps=8)


def rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> None:
    """Write x (T, H, D), rotated by cos and sin (T, D) or turned `back`, to out (T, H, D); unit last strides."""
    count, heads, width = x.shape
    launch = tiles(width // 2)
    grid = (triton.cdiv(count, launch["ROWS"]), triton.cdiv(heads, launch["GROUP"]))
    if count:
        rotate_kernel[grid](
            x,
            out,
            cos,
            sin,
            count,
            heads,
            width // 2,
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            cos.stride(0),
            BACK=back,
            **launch,
            **FUSION,
        )
