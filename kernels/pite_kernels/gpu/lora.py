"""The two thin products of LoRA's backward pass from one read of dY: dY B (for dX and dA) and dY' (x A') (for dB).

Both are memory-bound, and dY is the largest tensor of the layer. Row programs compute parts of dY B, column programs
compute parts of dY' (x A'). Both kinds run at the same time, and each sweeps its strip of dY from its own start: row
program u and column program v reach tile (u, v) at the same time. One of the two reads the tile from memory, the other
from the L2 cache.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch


@triton.jit
def lora_bwd_thin_products_kernel(
    grad_ptr,
    b_ptr,
    low_ptr,
    grad_low_ptr,
    partial_ptr,
    scale,
    count,
    width,
    grad_stride,
    low_stride,
    group,
    rank,
    RANK: tl.constexpr,
    OWN: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """A row program: OWN rows of scale * dY B, summed over all columns. A column program: OWN columns of scale * dY' L.

    grad = dY (count, width), b (width, rank), low = L = x A' (count, rank), grad_low = scale * dY B (count, rank),
    partial = scale * dY' L of each group (groups, width, rank) float32. A group has `group` rows. Of its programs, the
    first cdiv(group, OWN) are row programs, the next cdiv(width, OWN) column programs.
    """
    row_blocks = tl.cdiv(group, OWN)
    blocks = row_blocks + tl.cdiv(width, OWN)
    first = (tl.program_id(0) // blocks) * group
    last = tl.minimum(first + group, count)
    block = tl.program_id(0) % blocks
    own = tl.arange(0, OWN)
    r = tl.arange(0, RANK)
    acc = tl.zeros([OWN, RANK], tl.float32)
    if block < row_blocks:
        m = first + block * OWN + own
        steps = tl.cdiv(width, SWEEP)
        skip = steps - block * steps // row_blocks
        for step in range(0, steps):
            n = ((step + skip) % steps) * SWEEP + tl.arange(0, SWEEP)
            at = m[:, None].to(tl.int64) * grad_stride + n[None, :]
            grad = tl.load(grad_ptr + at, mask=(m < last)[:, None] & (n < width)[None, :], other=0.0)  # (OWN, SWEEP)
            b = tl.load(
                b_ptr + n[:, None] * rank + r[None, :], mask=(n < width)[:, None] & (r < rank)[None, :], other=0.0
            )  # (SWEEP, RANK)
            acc = tl.dot(grad, b, acc, input_precision="ieee")
        out = grad_low_ptr + m[:, None].to(tl.int64) * low_stride + r[None, :]
        keep = (m < last)[:, None] & (r < rank)[None, :]
        tl.store(out, (acc * scale).to(grad_low_ptr.dtype.element_ty), mask=keep)
    else:
        block -= row_blocks
        n = block * OWN + own
        steps = tl.cdiv(last - first, SWEEP)
        skip = steps - block * steps // tl.cdiv(width, OWN)
        for step in range(0, steps):
            m = first + ((step + skip) % steps) * SWEEP + tl.arange(0, SWEEP)
            at = m[:, None].to(tl.int64) * grad_stride + n[None, :]
            grad = tl.load(grad_ptr + at, mask=(m < last)[:, None] & (n < width)[None, :], other=0.0)  # (SWEEP, OWN)
            at = m[:, None].to(tl.int64) * low_stride + r[None, :]
            low = tl.load(low_ptr + at, mask=(m < last)[:, None] & (r < rank)[None, :], other=0.0)  # (SWEEP, RANK)
            acc = tl.dot(tl.trans(grad), low, acc, input_precision="ieee")
        at = ((first // group).to(tl.int64) * width + n[:, None]) * rank + r[None, :]
        tl.store(partial_ptr + at, acc * scale, mask=(n < width)[:, None] & (r < rank)[None, :])


def tiles(rank: int) -> Launch:
    """Tile sizes of the kernel in half precision: two programs fit on one multiprocessor of Hopper.

    maxnreg  255, the most registers a thread can have: without it ptxas stops at 64 on sm_100 and spills (Triton 3.7)
    """
    launch = dict(OWN=128, SWEEP=64, num_warps=8, num_stages=4, maxnreg=255)
    return dict(RANK=max(16, triton.next_power_of_2(rank)), **launch)


def thin_products(grad: Tensor, lora_b: Tensor, low: Tensor, scale: float, splits: list[int]) -> tuple[Tensor, Tensor]:
    """(scale dY_i B_i concatenated along columns, in dY's dtype; scale dY_i' L_i concatenated along rows, float32).

    grad (T, sum(splits)) with unit last stride;  lora_b (sum(splits), r);  low = x A' (T, parts * r)
    """
    count, rank = grad.shape[0], lora_b.shape[1]
    launch = tiles(rank)
    lora_b, grad_low = lora_b.contiguous(), torch.empty_like(low)
    grad_b = low.new_zeros(lora_b.shape, dtype=torch.float32)
    if not count:
        return grad_low, grad_b
    parts = zip(grad.split(splits, 1), lora_b.split(splits), low.split(rank, 1), grad_low.split(rank, 1))
    for part, total in zip(parts, grad_b.split(splits)):
        # A group has about as many rows as columns, so that both kinds of program sweep equally far.
        width = part[0].shape[1]
        group = triton.cdiv(count, max(1, round(count / width)) * launch["OWN"]) * launch["OWN"]
        groups = triton.cdiv(count, group)
        partial = total.new_empty((groups, width, rank))
        blocks = triton.cdiv(group, launch["OWN"]) + triton.cdiv(width, launch["OWN"])
        lora_bwd_thin_products_kernel[(groups * blocks,)](
            *part, partial, scale, count, width, grad.stride(0), low.stride(0), group, rank, **launch, **FUSION
        )
        torch.sum(partial, 0, out=total)
    return grad_low, grad_b
