"""The sum over the copies of each row: the backward pass of gathering rows.

Most rows have one copy, and a shared prefix has as many as there are samples. A program reads the first copy of its row
alone and the others eight at a time, so that many loads are in flight. The order of the sum depends on the lists only.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch, tile_of


@triton.jit
def gather_rows_bwd_kernel(
    grad_ptr, inverse_ptr, offset_ptr, out_ptr, width, out_row, COPIES: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK columns of one row of out.

    grad (K, width) contiguous, inverse (K,), offsets (T + 1,);  out (T, width) with strides (out_row, 1)
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = columns < width
    first = tl.load(offset_ptr + row)
    last = tl.load(offset_ptr + row + 1)
    copy = tl.load(inverse_ptr + first, mask=first < last, other=0)
    total = tl.load(grad_ptr + copy * width + columns, mask=keep & (first < last), other=0.0).to(tl.float32)  # (BLOCK,)
    for start in range(first + 1, last, COPIES):
        at = start + tl.arange(0, COPIES)
        copies = tl.load(inverse_ptr + at, mask=at < last, other=0)[:, None]  # (COPIES, 1)
        mask = (at < last)[:, None] & keep[None, :]
        values = tl.load(grad_ptr + copies * width + columns[None, :], mask=mask, other=0.0)  # (COPIES, BLOCK)
        total += tl.sum(values.to(tl.float32), 0)
    tl.store(out_ptr + row * out_row + columns, total.to(out_ptr.dtype.element_ty), mask=keep)


def tiles(width: int) -> Launch:
    """Columns per program, and warps: a thread loads 16 bytes of a copy in half precision."""
    return dict(COPIES=8, BLOCK=tile_of(width, 1024), num_warps=4)


def sum_rows(grad: Tensor, inverse: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Row t of out (T, width) = sum of grad[inverse[offsets[t]:offsets[t + 1]]]; grad (K, width) contiguous."""
    count, width = out.shape
    launch = tiles(width)
    if count and width:
        grid = (count, triton.cdiv(width, launch["BLOCK"]))
        gather_rows_bwd_kernel[grid](grad, inverse, offsets, out, width, out.stride(0), **launch, **FUSION)
