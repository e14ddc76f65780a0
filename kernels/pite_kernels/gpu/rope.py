"""Rotary embedding from one strided tensor of heads into another, which may be the same memory.

One program holds the cosines and sines of some tokens and rotates one head after another. Forward rotates the fused
q, k, v projection in place; backward writes the rotated gradients straight into the fused gradient. Neither makes a
copy first. Keys that several documents share are rotated into the place of each copy, and their gradients are summed and
rotated back in one pass.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch, tile_of


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


@triton.jit
def rope_sum_bwd_kernel(
    grad_ptr,
    inverse_ptr,
    offset_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    pairs,
    table_row,
    out_row,
    HALF: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK of the `pairs` of columns of one row of out: the sum of the row's copies, rotated back.

    grad (K, 2 * pairs) contiguous, inverse (K,), offsets (T + 1,) as in `gather_rows_bwd_kernel`
    cos, sin (T, 2 * HALF) with row stride table_row;  out (T, 2 * pairs) with strides (out_row, 1)
    A head has HALF pairs: column j is paired with column j + HALF.
    """
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = pair < pairs
    column = pair // HALF * (2 * HALF) + pair % HALF
    first = tl.load(offset_ptr + row)
    last = tl.load(offset_ptr + row + 1)
    at = grad_ptr + tl.load(inverse_ptr + first, mask=first < last, other=0) * 2 * pairs + column
    left = tl.load(at, mask=keep & (first < last), other=0.0).to(tl.float32)  # (BLOCK,)
    right = tl.load(at + HALF, mask=keep & (first < last), other=0.0).to(tl.float32)  # (BLOCK,)
    for start in range(first + 1, last, COPIES):
        places = start + tl.arange(0, COPIES)
        copies = tl.load(inverse_ptr + places, mask=places < last, other=0)[:, None]  # (COPIES, 1)
        mask = (places < last)[:, None] & keep[None, :]
        several = grad_ptr + copies * 2 * pairs + column[None, :]  # (COPIES, BLOCK)
        left += tl.sum(tl.load(several, mask=mask, other=0.0).to(tl.float32), 0)
        right += tl.sum(tl.load(several + HALF, mask=mask, other=0.0).to(tl.float32), 0)
    cos = tl.load(cos_ptr + row * table_row + pair % HALF, mask=keep, other=0.0).to(tl.float32)  # (BLOCK,)
    sin = tl.load(sin_ptr + row * table_row + pair % HALF, mask=keep, other=0.0).to(tl.float32)  # (BLOCK,)
    out = out_ptr + row * out_row + column
    tl.store(out, (left * cos + right * sin).to(out_ptr.dtype.element_ty), mask=keep)
    tl.store(out + HALF, (right * cos - left * sin).to(out_ptr.dtype.element_ty), mask=keep)


def sum_tiles(pairs: int) -> Launch:
    """Copies and pairs of columns per program, and warps."""
    return dict(COPIES=8, BLOCK=tile_of(pairs, 512), num_warps=4)


def sum_and_rotate_back(grad: Tensor, inverse: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Row t of out (T, H, D) = sum of grad[inverse[offsets[t]:offsets[t + 1]]], rotated back by row t of cos and sin.

    grad (K, H, D) contiguous; all copies of a row have its position
    """
    count, heads, width = out.shape
    pairs = heads * width // 2
    launch = sum_tiles(pairs)
    if count and pairs:
        grid = (count, triton.cdiv(pairs, launch["BLOCK"]))
        rope_sum_bwd_kernel[grid](
            grad,
            inverse,
            offsets,
            cos,
            sin,
            out,
            pairs,
            cos.stride(0),
            out.stride(0),
            HALF=width // 2,
            **launch,
            **FUSION,
        )


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
