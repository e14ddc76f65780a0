"""Rotary embedding from one strided tensor of heads into another, which may be the same memory.

One program holds the cosines and sines of some tokens and rotates one head after another. Forward rotates the fused
q, k, v projection in place; backward writes the rotated gradients straight into the fused gradient. Neither makes a
copy first. Keys that several documents share are rotated into the place of each copy.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch


@triton.jit
def rope_rotate_kernel(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    index_ptr,
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
    """One program: ROWS tokens of GROUP heads. BACK rotates by the negative angle, which is the backward pass.

    x, out (count, heads, 2 * half) with strides (x_row, x_head, 1) and (out_row, out_head, 1); they may be one memory
    cos, sin (count, 2 * half) with row stride table_row; only their first `half` columns are read
    index    (count,) or None: the row of x, cos and sin that each row of out is made from
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    keep = (rows < count) & (columns < half)
    out_rows = rows
    if index_ptr is not None:
        rows = tl.load(index_ptr + rows, mask=rows < count, other=0)  # (ROWS, 1)
    cos = tl.load(cos_ptr + rows * table_row + columns, mask=keep, other=0.0).to(tl.float32)  # (ROWS, HALF)
    sin = tl.load(sin_ptr + rows * table_row + columns, mask=keep, other=0.0).to(tl.float32)  # (ROWS, HALF)
    if BACK:
        sin = -sin
    first = tl.program_id(1) * GROUP
    for head in range(first, tl.minimum(first + GROUP, heads)):
        x = x_ptr + rows * x_row + head * x_head + columns
        left = tl.load(x, mask=keep, other=0.0).to(tl.float32)  # (ROWS, HALF)
        right = tl.load(x + half, mask=keep, other=0.0).to(tl.float32)  # (ROWS, HALF)
        out = out_ptr + out_rows * out_row + head * out_head + columns
        tl.store(out, (left * cos - right * sin).to(out_ptr.dtype.element_ty), mask=keep)
        tl.store(out + half, (right * cos + left * sin).to(out_ptr.dtype.element_ty), mask=keep)


def tiles(half: int) -> Launch:
    """Tokens and heads per program, and warps: each thread loads 16 bytes at a time in half precision."""
    width = max(16, triton.next_power_of_2(half))
    return dict(GROUP=8, ROWS=max(1, 2048 // width), HALF=width, num_warps=8)


def rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, *, back: bool, rows: Tensor | None = None) -> None:
    """Write x (T, H, D), rotated by the tables cos and sin (T, D), to out (T, H, D); `back` inverts the rotation.

    x and out need unit last strides. With `rows` (K,) int64, row i of out (K, H, D) is row rows[i] of x, rotated.
    """
    count, heads, width = out.shape
    launch = tiles(width // 2)
    grid = (triton.cdiv(count, launch["ROWS"]), triton.cdiv(heads, launch["GROUP"]))
    if count and heads:
        rope_rotate_kernel[grid](
            x,
            out,
            cos,
            sin,
            rows,
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
