"""The two thin products of LoRA's backward pass from one read of dY: dY B (for dX and dA) and dY' (x A') (for dB).

Both are bound by the traffic of dY, the largest tensor of the layer. Row programs compute parts of dY B, column
programs compute parts of dY' (x A'). Both kinds run at the same time, and each sweeps its strip of dY from its own
start: row program u and column program v reach tile (u, v) at the same time. One of the two reads the tile from memory,
the other from the L2 cache. Layers that share an input, such as q, k and v, are parts of one launch.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch, multiprocessors

PARTS, OWN, SWEEP = 3, 128, 64
"""Layers in one launch; rows or columns that a program owns; columns or rows of one of its steps."""


@triton.jit
def select(pid, end_0, end_1, a, b, c):
    """a, b or c: the value of part 0, 1 or 2, which end at programs end_0, end_1 and the last one."""
    return tl.where(pid < end_0, a, tl.where(pid < end_1, b, c))


@triton.jit(do_not_specialize=["count", "group"])
def lora_bwd_thin_products_kernel(
    grad_ptr,
    b_ptr,
    low_ptr,
    grad_low_ptr,
    partial_ptr,
    scale,
    count,
    group,
    width_0,
    width_1,
    width_2,
    grad_stride,
    low_stride,
    rank,
    RANK: tl.constexpr,
    OWN: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """A row program: OWN rows of scale * dY B, summed over a part's columns. A column program: OWN columns of dY' L.

    grad = dY (count, widths), b (widths, rank), low = L = x A' (count, parts * rank), with the columns of parts 0, 1, 2
    side by side; a part that does not exist has width 0. grad_low = scale * dY_i B_i (count, parts * rank), partial =
    scale * dY' L of each group of `group` rows (groups, widths, rank) float32. Programs are sorted by part, then group;
    of a group's, the first cdiv(group, OWN) are row programs, the next cdiv(width, OWN) column programs.
    """
    # 1. The part of this program: its width, and what comes before it.
    groups = tl.cdiv(count, group)
    row_blocks = tl.cdiv(group, OWN)
    end_0 = groups * (row_blocks + tl.cdiv(width_0, OWN))
    end_1 = end_0 + groups * (row_blocks + tl.cdiv(width_1, OWN))
    pid = tl.program_id(0)
    width = select(pid, end_0, end_1, width_0, width_1, width_2)
    column = select(pid, end_0, end_1, 0, width_0, width_0 + width_1)
    part = select(pid, end_0, end_1, 0, rank, 2 * rank)
    pid -= select(pid, end_0, end_1, 0, end_0, end_1)
    # 2. Its group of rows, and its block among the group's programs.
    blocks = row_blocks + tl.cdiv(width, OWN)
    first = (pid // blocks) * group
    last = tl.minimum(first + group, count)
    block = pid % blocks
    own = tl.arange(0, OWN)
    grad_ptr += column
    b_ptr += column.to(tl.int64) * rank
    low_ptr += part
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
            at = n[:, None] * rank + r[None, :]
            b = tl.load(b_ptr + at, mask=(n < width)[:, None] & (r < rank)[None, :], other=0.0)  # (SWEEP, RANK)
            acc = tl.dot(grad, b, acc, input_precision="ieee")
        out = grad_low_ptr + part + m[:, None].to(tl.int64) * low_stride + r[None, :]
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
        before = (first // group).to(tl.int64) * (width_0 + width_1 + width_2) + column
        at = (before + n[:, None]) * rank + r[None, :]
        tl.store(partial_ptr + at, acc * scale, mask=(n < width)[:, None] & (r < rank)[None, :])


def tiles(rank: int) -> Launch:
    """Tile sizes of the kernel in half precision: two programs fit on one multiprocessor of Hopper.

    maxnreg  255, the most registers a thread can have: without it ptxas stops at 64 on sm_100 and spills (Triton 3.7)
    """
    launch = dict(OWN=OWN, SWEEP=SWEEP, num_warps=8, num_stages=4, maxnreg=255)
    return dict(RANK=max(16, triton.next_power_of_2(rank)), **launch)


@lru_cache(maxsize=1 << 16)
def group_rows(count: int, widths: tuple[int, ...], slots: int) -> int:
    """Rows of a group, such that the programs of one launch keep `slots` programs busy to the end.

    A group at first has about as many rows as the widest part has columns, so that both kinds of program sweep equally
    far. More groups make column programs shorter, and cost the traffic of more partial sums. Example: gate and up of
    11,008 columns, 16,384 rows, 264 slots. One group takes 432 steps where 336 would fill every slot; 3 groups take 352.
    """
    fewest = max(1, round(count / max(widths)))

    def height(groups: int) -> int:
        return triton.cdiv(count, groups * OWN) * OWN

    def steps(groups: int) -> float:
        group = height(groups)
        groups = triton.cdiv(count, group)
        jobs: list[tuple[int, float]] = []  # (programs, steps of each), in launch order
        for width in widths:
            jobs.append((groups * triton.cdiv(group, OWN), triton.cdiv(width, SWEEP)))
            # Writing and reading a partial sum takes as long as about four steps.
            jobs.append((groups * triton.cdiv(width, OWN), triton.cdiv(group, SWEEP) + 4))
        return _last_end(jobs, slots)

    return height(min(range(fewest, 4 * fewest + 1), key=steps))


def _last_end(jobs: list[tuple[int, float]], slots: int) -> float:
    """When the last of some programs ends, if each starts on the first free slot, the longest ones first."""
    free = [(0.0, slots)]  # (time, slots that become free then)
    for number, length in sorted(jobs, key=lambda job: -job[1]):
        while number:
            time, available = free.pop(0)
            used = min(number, available)
            number -= used
            if available > used:
                free.append((time, available - used))
            free.append((time + length, used))
            free.sort()
    return max(time for time, _ in free)


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
    slots = 2 * multiprocessors(grad.device)
    for i in range(0, len(splits), PARTS):
        widths = splits[i : i + PARTS]
        start, total, padded = sum(splits[:i]), sum(widths), [*widths, 0, 0]
        group = group_rows(count, tuple(widths), slots)
        groups = triton.cdiv(count, group)
        blocks = sum(triton.cdiv(group, OWN) + triton.cdiv(width, OWN) for width in widths)
        partial = grad_b.new_empty((groups, total, rank))
        lora_bwd_thin_products_kernel[(groups * blocks,)](
            grad.narrow(1, start, total),
            lora_b.narrow(0, start, total),
            low.narrow(1, i * rank, len(widths) * rank),
            grad_low.narrow(1, i * rank, len(widths) * rank),
            partial,
            scale,
            count,
            group,
            *padded[:PARTS],
            grad.stride(0),
            low.stride(0),
            rank,
            **launch,
            **FUSION,
        )
        torch.sum(partial, 0, out=grad_b.narrow(0, start, total))
    return grad_low, grad_b
