"""The two thin products of LoRA's backward pass in one reading of dY: dY B for dX and dA, and dY' (x A') for dB.

Each is bound by memory, and dY is the largest tensor of the layer. Blocks of rows own parts of dY B, blocks of columns
own parts of dY' (x A'); both kinds run side by side and sweep their strip of dY from a start of their own, so that the
block of rows u and the block of columns v meet in the tile (u, v) at the same time. One of them fetches it from memory,
the other finds it in the second-level cache.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch


@triton.jit
def thin_products_kernel(
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
            grad = tl.load(grad_ptr + at, mask=(m < last)[:, None] & (n < width)[None, :], other=0.0)
            b = tl.load(
                b_ptr + n[:, None] * rank + r[None, :], mask=(n < width)[:, None] & (r < rank)[None, :], other=0.0
            )
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
            grad = tl.load(grad_ptr + at, mask=(m < last)[:, None] & (n < width)[None, :], other=0.0)
            at = m[:, None].to(tl.int64) * low_stride + r[None, :]
            low = tl.load(low_ptr + at, mask=(m < last)[:, None] & (r < rank)[None, :], other=0.0)
            acc = tl.dot(tl.trans(grad), low, acc, input_precision="ieee")
        at = ((first // group).to(tl.int64) * width + n[:, None]) * rank + r[None, :]
        tl.store(partial_ptr + at, acc * scale, mask=(n < width)[:, None] & (r < rank)[None, :])


def tiles(rank: int) -> Launch:
    """Tile sizes of the kernel in half precision: two blocks fit a Hopper multiprocessor.

    maxnreg  all registers of a thread: without it ptxas stops at 64 on sm_100 and spills (Triton 3.7)
    """
    launch = dict(OWN=128, SWEEP=64, num_warps=8, num_stages=4, maxnreg=255)
    return dict(RANK=max(16, triton.next_power_of_2(rank)), **launch)


def thin_products(grad: Tensor, lora_b: Tensor, low: Tensor, scale: float, splits: list[int]) -> tuple[Tensor, Tensor]:
    """(scale dY_i B_i side by side, in dY's dtype; scale dY_i' L_i stacked, float32).

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
        # As many rows to a group as there are columns: then both kinds of block take equally long to cross it.
        width = part[0].shape[1]
        group = triton.cdiv(count, max(1, round(count / width)) * launch["OWN"]) * launch["OWN"]
        groups = triton.cdiv(count, group)
        partial = total.new_empty((groups, width, rank))
        blocks = triton.cdiv(group, launch["OWN"]) + triton.cdiv(width, launch["OWN"])
        thin_products_kernel[(groups * blocks,)](
            *part, partial, scale, count, width, grad.stride(0), low.stride(0), group, rank, **launch, **FUSION
        )
        torch.sum(partial, 0, out=total)
    return grad_low, grad_b
