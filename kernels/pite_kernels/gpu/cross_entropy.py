"""Cross-entropy of the vocabulary head on CUDA: cuBLAS for the GEMMs of each chunk, one Triton kernel between them.

The kernel turns a row of logits into its loss and, in place, into p - (1 - eps) [target]. The uniform part of the
smoothing has rank one and goes into the epilogue of the next GEMM. Chunks of 1024 to 2048 rows keep cuBLAS at full
speed; 2048 rows of logits with V = 32000 in half precision take 131 MB.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, finish_loss, multiprocessors, zero_rows

_INVALID = "linear_cross_entropy: a target id is not in the vocabulary, or a row is out of range"


@triton.jit(do_not_specialize=["total_rows", "ignore_index"])
def cross_entropy_softmax_kernel(
    logits_ptr,
    ids_ptr,
    partial_ptr,
    total_rows,
    vocabulary,
    stride,
    smoothing,
    ignore_index,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row of a chunk; its loss and, with GRADIENT, in place p - (1 - smoothing) [target].

    logits (rows, vocabulary) with row stride `stride`, ids (rows,) int64. Loads and stores cover the whole stride, so that
    each takes 16 bytes for any vocabulary; what is between the rows is overwritten.
    partial (3, total_rows) float32, offset to this chunk's first row: loss, 1 if counted, 1 if the id is invalid
    """
    row = tl.program_id(0)
    target = tl.load(ids_ptr + row)  # scalar
    counted = target != ignore_index
    invalid = counted & ((target < 0) | (target >= vocabulary))
    counted = counted & (invalid == 0)
    logits_ptr += row.to(tl.int64) * stride
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    # Online softmax: each lane keeps its own running maximum; the lanes are combined once, after the last block.
    for start in range(0, vocabulary, BLOCK):
        keep = start + column < vocabulary
        x = tl.load(logits_ptr + start + column, mask=start + column < stride, other=0.0).to(tl.float32)  # (BLOCK,)
        x = tl.where(keep, x, float("-inf"))
        higher = tl.maximum(top, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - safe) + tl.exp(x - safe)
        total += tl.where(keep, x, 0.0)
        top = higher
    highest = tl.max(top)
    lse = highest + tl.log(tl.sum(mass * tl.exp(top - highest)))
    picked = tl.load(logits_ptr + target, mask=counted, other=0.0).to(tl.float32)  # scalar
    loss = lse - (1.0 - smoothing) * picked - smoothing * (tl.sum(total) / vocabulary)
    tl.store(partial_ptr + row, tl.where(counted, loss, 0.0))
    tl.store(partial_ptr + total_rows + row, counted.to(tl.float32))
    tl.store(partial_ptr + 2 * total_rows + row, invalid.to(tl.float32))
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            keep = start + column < stride
            x = tl.load(logits_ptr + start + column, mask=keep, other=0.0).to(tl.float32)  # (BLOCK,)
            p = tl.exp(x - lse) - tl.where(start + column == target, 1.0 - smoothing, 0.0)
            p = tl.where(counted, p, 0.0)
            tl.store(logits_ptr + start + column, p.to(logits_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["count", "num_rows"])
def cross_entropy_bwd_scatter_rows_kernel(
    out_ptr,
    source_ptr,
    sorted_ptr,
    order_ptr,
    coefficient_ptr,
    count,
    num_rows,
    depth,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one source row, scaled by the coefficient and added into its row of out.

    source (count, depth), out (num_rows, depth), coefficient 0-dim, or with PER_ROW (count,)
    sorted (count,) int64: row indices of out in rising order; order (count,) int64: the source row of each of them
    sorted and order are None where source row i goes to row i. Of equal rows, only the first one's program writes.
    """
    slot = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = column < depth
    if sorted_ptr is None:
        coefficient = tl.load(coefficient_ptr + (slot if PER_ROW else 0))  # scalar
        at = slot.to(tl.int64) * depth + column
        value = tl.load(source_ptr + at, mask=keep, other=0.0).to(tl.float32) * coefficient  # (BLOCK,)
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=keep)
    else:
        row = tl.load(sorted_ptr + slot)  # scalar
        before = tl.load(sorted_ptr + slot - 1, mask=slot > 0, other=-1)  # scalar
        # The first of equal rows sums all of them, in the caller's order: no atomics, the same bits on every run.
        if (row != before) & (row >= 0) & (row < num_rows):
            total = tl.zeros([BLOCK], tl.float32)
            at = slot
            same = row
            while same == row:
                source = tl.load(order_ptr + at)  # scalar
                value = tl.load(source_ptr + source * depth + column, mask=keep, other=0.0).to(tl.float32)  # (BLOCK,)
                if PER_ROW:
                    value *= tl.load(coefficient_ptr + source)  # scalar
                total += value
                at += 1
                same = tl.load(sorted_ptr + at, mask=at < count, other=-1)  # scalar
            if PER_ROW == 0:
                total *= tl.load(coefficient_ptr)  # scalar
            tl.store(out_ptr + row * depth + column, total.to(out_ptr.dtype.element_ty), mask=keep)


def chunk_rows(vocabulary: int, depth: int, processors: int) -> int:
    """Rows per chunk, a multiple of 128 from 1024 to 2048: the one whose two GEMMs waste least of their last waves.

    Example, d = 5120 on 132 multiprocessors: dX of 2048 rows has 16 x 20 tiles of 128 x 256, which fill 2.4 waves and
    take 3; dX of 1664 rows has 13 x 20 tiles, which fill 1.97 waves and take 2. 1664 is chosen.
    """

    def waves(tiles: int) -> float:
        return triton.cdiv(tiles, processors) * processors / tiles

    def cost(rows: int) -> float:
        # cuBLAS uses 128 x 256 tiles for large products in half precision.
        return sum(waves(rows // 128 * triton.cdiv(width, 256)) for width in (vocabulary, depth))

    return min(range(2048, 1023, -128), key=cost)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    rows: Tensor | None,
    normalizer: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, dX of the rows, dW, db, losses), as `pite_kernels.cross_entropy.cross_entropy_forward` returns them."""
    count, (vocabulary, depth) = target_ids.numel(), weight.shape
    head = weight.to(hidden.dtype)
    head_bias = None if bias is None else bias.to(hidden.dtype)
    target_ids = target_ids.contiguous()
    partial = hidden.new_empty((3, count), dtype=torch.float32)
    gradient = need_hidden or need_weight or need_bias
    grad_hidden = hidden.new_empty((count, depth) if need_hidden else 0)
    grad_weight = hidden.new_zeros((vocabulary, depth) if need_weight else 0, dtype=torch.float32)
    grad_bias = hidden.new_zeros(vocabulary if need_bias else 0, dtype=torch.float32)
    centre = None
    if label_smoothing and need_hidden:
        centre = (head.mean(0, dtype=torch.float32) * -label_smoothing).to(hidden.dtype)
    chunk = chunk_rows(vocabulary, depth, multiprocessors(hidden.device))
    # Rows at multiples of 16 numbers, for vocabularies such as LLaVA's 32003 too.
    padded = hidden.new_empty((min(chunk, count), triton.cdiv(vocabulary, 16) * 16))
    if vocabulary % 16:
        # oneDNN's bfloat16 GEMM with AMX multiplies the padding by zero, and NaN times zero is NaN.
        padded.narrow(1, vocabulary, padded.shape[1] - vocabulary).zero_()
    logits = padded.narrow(1, 0, vocabulary)
    gathered = hidden.new_empty((0 if rows is None else min(chunk, count), depth))
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        ids, out = target_ids.narrow(0, start, size), logits.narrow(0, 0, size)
        if rows is None:
            x = hidden.narrow(0, start, size)
        else:
            x = gathered.narrow(0, 0, size)
            torch.index_select(hidden, 0, _clamped(rows.narrow(0, start, size), hidden.shape[0]), out=x)
        if head_bias is None:
            torch.mm(x, head.t(), out=out)
        else:
            torch.addmm(head_bias, x, head.t(), out=out)
        cross_entropy_softmax_kernel[(size,)](
            out,
            ids,
            partial.narrow(1, start, size),
            count,
            vocabulary,
            out.stride(0),
            label_smoothing,
            ignore_index,
            GRADIENT=gradient,
            BLOCK=min(4096, triton.next_power_of_2(vocabulary)),
            num_warps=8,
            **FUSION,
        )
        if need_hidden:
            dx = grad_hidden.narrow(0, start, size)
            if centre is None:
                torch.mm(out, head, out=dx)
            else:
                torch.addmm(centre, out, head, out=dx)
                zero_rows(dx, ids, ignore_index)
        counted = partial.select(0, 1).narrow(0, start, size)
        if weights is not None:
            counted = counted * weights.narrow(0, start, size)
        if need_weight:
            # The rows of x take the weights, because they are shorter than those of the logits.
            add_product(grad_weight, out, x if weights is None else x * counted.unsqueeze(1).to(x.dtype))
            if label_smoothing:
                # The smoothing's part of dW, equal for every token of the vocabulary: counted' X in float32.
                grad_weight -= label_smoothing / vocabulary * (counted.unsqueeze(1) * x).sum(0)
        if need_bias:
            of_rows = out if weights is None else out * counted.unsqueeze(1).to(out.dtype)
            grad_bias += of_rows.sum(0, dtype=torch.float32) - label_smoothing / vocabulary * counted.sum()
    if rows is not None:
        partial.select(0, 2).add_(((rows < 0) | (rows >= hidden.shape[0])).float())
    losses = partial.select(0, 0)
    if weights is not None:
        losses = losses.clone()
        partial.select(0, 0).mul_(weights)
    loss, scale = finish_loss(partial, normalizer, _INVALID)
    return loss, scale, grad_hidden, grad_weight, grad_bias, losses


def _clamped(rows: Tensor, count: int) -> Tensor:
    # Clamped, so that a row out of range triggers our assert with its message, not the one of index_select.
    return rows.clamp(0, max(count - 1, 0))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left' right with total in float32; the product is never rounded to half precision."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.t().float(), right.float())


def scatter_rows(source: Tensor, rows: Tensor | None, coefficient: Tensor, num_rows: int) -> Tensor:
    """(num_rows, d) with coefficient * source[i] added into row rows[i], in a fixed order."""
    count, depth = source.shape
    grid = (count, triton.cdiv(depth, 1024))
    if rows is None:
        out, ordered, order = torch.empty_like(source), None, None
    else:
        out = source.new_zeros((num_rows, depth))
        ordered, order = rows.sort(stable=True)
    if count:
        cross_entropy_bwd_scatter_rows_kernel[grid](
            out,
            source,
            ordered,
            order,
            coefficient,
            count,
            num_rows,
            depth,
            PER_ROW=coefficient.dim() == 1,
            BLOCK=1024,
            num_warps=4,
            **FUSION,
        )
    return out
