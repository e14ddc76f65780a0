"""The trajectory L1 loss in Triton: three GEMMs over the M selected rows, with the elementwise work in their epilogues.

forward   P = X W', kept in registers; writes the signs S of P + b - t (int8) and one partial loss per tile
dX        S W, written or accumulated directly into the selected rows of a (T, d) gradient
dW        S' X with gathered rows of X, split along the rows into float32 partials, which are summed in a fixed order

Several targets may select the same row. A linked list (head, next) joins them: the program of the list's head sums
their signs and is the only one that writes the row, so there are no floating-point atomics. Signs are integers, so the
order of the list does not change the sum.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch, finish_loss, multiprocessors, tile_of, zero_rows

_INVALID = "trajectory_l1: a target is not finite or half absent, or a row is out of range"


@triton.jit
def halves(x):
    """The left and right half of the columns of x (rows, columns)."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def l1_epilogue(
    prediction, bias_ptr, target_ptr, sign_ptr, m, column, inside, count, outputs, SKIP_ABSENT: tl.constexpr
):
    """Store the signs of prediction - target; (summed distance, coordinates counted, invalid coordinates)."""
    n = column + tl.arange(0, prediction.shape[1])
    keep = (m < count)[:, None] & (n < outputs)[None, :]
    at = m[:, None] * outputs + n[None, :]
    target = tl.load(target_ptr + at, mask=keep, other=0.0).to(tl.float32)  # (BLOCK_M, columns)
    # x - x is 0 for finite numbers only.
    invalid = tl.sum((keep & ((target - target != 0.0) | (inside == 0)[:, None])).to(tl.int32))
    counted = tl.sum(keep.to(tl.int32))
    if bias_ptr is not None:
        prediction += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]  # (columns,)
    distance = tl.where(keep, prediction - target, 0.0)
    if SKIP_ABSENT:
        absent = keep & (target == -1.0)
        counted -= tl.sum(absent.to(tl.int32))
        # Columns 2i and 2i + 1 are the x and y of one point. A pair with one absent coordinate is invalid.
        pairs = tl.sum(tl.reshape(absent.to(tl.int32), [absent.shape[0], absent.shape[1] // 2, 2]), 2)
        invalid += tl.sum((pairs == 1).to(tl.int32))
        distance = tl.where(absent, 0.0, distance)
    sign = (distance > 0).to(tl.int8) - (distance < 0).to(tl.int8)
    tl.store(sign_ptr + at, sign, mask=keep)
    return tl.sum(tl.abs(distance)), counted, invalid


@triton.jit
def trajectory_l1_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    rows_ptr,
    sign_ptr,
    partial_ptr,
    count,
    num_rows,
    stride,
    depth,
    outputs,
    SKIP_ABSENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: the tile of BLOCK_M targets and BLOCK_N outputs of |X W' + b - t|; its signs and partial sums.

    hidden (T, d) with row stride `stride`, rows (M,) int64, weight (O, d), bias (O,) or None, target (M, O)
    sign (M, O) int8;  partial (3, programs) float32: loss, coordinates counted, invalid coordinates
    Sizes: count = M, num_rows = T, depth = d, outputs = O = P * N * 2. EVEN_K: d is a multiple of BLOCK_K.
    """
    # Tiles with the same rows of X have neighbouring program ids, so that X is read from memory once.
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    first = (tl.program_id(0) // tiles_n) * BLOCK_M
    column = (tl.program_id(0) % tiles_n) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    count -= first
    row = tl.load(rows_ptr + first + m, mask=m < count, other=0)  # (BLOCK_M,)
    inside = (row >= 0) & (row < num_rows)
    row = tl.where(inside, row, 0)
    x_ptr = hidden_ptr + row[:, None] * stride + k[None, :]
    w_ptr = weight_ptr + tl.where(n < outputs, n, 0)[None, :].to(tl.int64) * depth + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptr)  # (BLOCK_K, BLOCK_N)
        else:
            x = tl.load(x_ptr, mask=k[None, :] < depth - start, other=0.0)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptr, mask=k[:, None] < depth - start, other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    # The epilogue takes 16 columns at a time: targets need 1/8 of the registers, and 2 programs fit a multiprocessor.
    if BLOCK_N == 128:
        left, right = halves(acc)
        a, b = halves(left)
        c, d = halves(right)
        pieces = halves(a) + halves(b) + halves(c) + halves(d)
    else:
        pieces = (acc,)
    target_ptr += tl.cast(first, tl.int64) * outputs
    sign_ptr += tl.cast(first, tl.int64) * outputs
    total, counted, invalid = 0.0, 0, 0
    for i in tl.static_range(len(pieces)):
        sums = l1_epilogue(pieces[i], bias_ptr, target_ptr, sign_ptr, m, column, inside, count, outputs, SKIP_ABSENT)
        total += sums[0]
        counted += sums[1]
        invalid += sums[2]
        column += pieces[i].shape[1]
    tile = partial_ptr + tl.program_id(0)
    tiles = tl.num_programs(0)
    tl.store(tile, total)
    tl.store(tile + tiles, tl.cast(counted, tl.float32))
    tl.store(tile + 2 * tiles, tl.cast(invalid, tl.float32))


@triton.jit
def trajectory_l1_bwd_link_rows_kernel(rows_ptr, head_ptr, next_ptr, count, num_rows, BLOCK: tl.constexpr):
    """One program: puts each of BLOCK targets at the head of the linked list of its row.

    rows (count,) int64; head (num_rows,) int32: the first target of each row, or -1; next (count,) int32: -1 at the end
    """
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + m, mask=m < count, other=-1)  # (BLOCK,)
    inside = (row >= 0) & (row < num_rows)
    before = tl.atomic_xchg(head_ptr + row, m, mask=inside)
    tl.store(next_ptr + m, tl.where(inside, before, -1), mask=m < count)


@triton.jit
def trajectory_l1_bwd_dx_kernel(
    grad_ptr,
    coefficient_ptr,
    weight_ptr,
    sign_ptr,
    rows_ptr,
    head_ptr,
    next_ptr,
    count,
    num_rows,
    depth,
    outputs,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M targets and BLOCK_N columns of dX = coefficient * S W, written to the rows of grad.

    grad (T, d), coefficient 0-dim, weight (O, d), sign (M, O) int8, rows (M,) int64; head (T,) and next (M,) int32 are
    the linked lists. Of the targets of one row, only the list's head writes. Sizes as in trajectory_l1_fwd_kernel.
    """
    tiles_n = tl.cdiv(depth, BLOCK_N)
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside_tile = m < count
    link = tl.load(next_ptr + m, mask=inside_tile, other=-1)  # (BLOCK_M,)
    s_ptr = sign_ptr + m[:, None].to(tl.int64) * outputs + k[None, :]
    w_ptr = weight_ptr + k[:, None].to(tl.int64) * depth + n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dtype = weight_ptr.dtype.element_ty
    if tl.max(link) < 0:  # no target of this tile has a next one in its list
        for start in range(0, outputs, BLOCK_K):  # loads w (BLOCK_K, BLOCK_N), s (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptr, mask=(k[:, None] < outputs - start) & (n < depth)[None, :], other=0.0)
            s = tl.load(s_ptr, mask=inside_tile[:, None] & (k[None, :] < outputs - start), other=0)
            acc = tl.dot(s.to(dtype), w, acc, input_precision="ieee")
            s_ptr += BLOCK_K
            w_ptr += BLOCK_K * depth
    else:
        for start in range(0, outputs, BLOCK_K):  # loads w (BLOCK_K, BLOCK_N), s (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptr, mask=(k[:, None] < outputs - start) & (n < depth)[None, :], other=0.0)
            s = tl.load(s_ptr, mask=inside_tile[:, None] & (k[None, :] < outputs - start), other=0).to(tl.int32)
            at = link
            while tl.max(at) >= 0:
                also_ptr = sign_ptr + at[:, None].to(tl.int64) * outputs + start + k[None, :]
                s += tl.load(also_ptr, mask=(at >= 0)[:, None] & (k[None, :] < outputs - start), other=0).to(tl.int32)
                at = tl.load(next_ptr + at, mask=at >= 0, other=-1)  # (BLOCK_M,)
            acc = tl.dot(s.to(dtype), w, acc, input_precision="ieee")
            s_ptr += BLOCK_K
            w_ptr += BLOCK_K * depth
    acc *= tl.load(coefficient_ptr)  # scalar
    row = tl.load(rows_ptr + m, mask=inside_tile, other=-1)  # (BLOCK_M,)
    inside = (row >= 0) & (row < num_rows)
    owner = inside & (tl.load(head_ptr + row, mask=inside, other=-1) == m)  # (BLOCK_M,)
    keep = owner[:, None] & (n < depth)[None, :]
    out_ptr = grad_ptr + row[:, None] * depth + n[None, :]
    if ACCUMULATE:
        acc += tl.load(out_ptr, mask=keep, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    tl.store(out_ptr, acc.to(grad_ptr.dtype.element_ty), mask=keep)


@triton.jit
def trajectory_l1_bwd_dw_kernel(
    partial_ptr,
    hidden_ptr,
    sign_ptr,
    rows_ptr,
    count,
    num_rows,
    stride,
    depth,
    outputs,
    chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M outputs and BLOCK_N columns of S' X, summed over `chunk` targets (one split).

    partial (splits, O, d) float32, hidden (T, d) with row stride `stride`, sign (M, O) int8, rows (M,) int64
    """
    tiles_n = tl.cdiv(depth, BLOCK_N)
    o = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, count)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        row = tl.load(rows_ptr + m, mask=m < last, other=-1)  # (BLOCK_K,)
        inside = (row >= 0) & (row < num_rows)
        s_ptr = sign_ptr + m[:, None].to(tl.int64) * outputs + o[None, :]
        s = tl.load(s_ptr, mask=inside[:, None] & (o < outputs)[None, :], other=0)  # (BLOCK_K, BLOCK_M)
        x_ptr = hidden_ptr + row[:, None] * stride + n[None, :]
        x = tl.load(x_ptr, mask=inside[:, None] & (n < depth)[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(tl.trans(s.to(x.dtype)), x, acc, input_precision="ieee")
    out_ptr = partial_ptr + (tl.program_id(1).to(tl.int64) * outputs + o[:, None]) * depth + n[None, :]
    tl.store(out_ptr, acc, mask=(o < outputs)[:, None] & (n < depth)[None, :])


@triton.jit
def trajectory_l1_bwd_dw_sum_kernel(partial_ptr, coefficient_ptr, out_ptr, splits, numel, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of dW, out (numel,) = coefficient * the sum of partial (splits, numel) over splits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + at, mask=at < numel, other=0.0)  # (BLOCK,)
        partial_ptr += numel
    total *= tl.load(coefficient_ptr)  # scalar
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < numel)


def forward_tiles(dtype: torch.dtype, count: int, outputs: int, processors: int) -> Launch:
    """Tile sizes of the forward kernel; half the height where full tiles are fewer than the multiprocessors."""
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=tile_of(outputs, 64), BLOCK_K=32, num_warps=4, num_stages=2)
    block_n = tile_of(outputs, 128)
    block_m = 128 if triton.cdiv(count, 128) * triton.cdiv(outputs, block_n) >= processors else 64
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, num_warps=8 if block_m == 128 else 4, num_stages=3)


def hidden_tiles(dtype: torch.dtype) -> Launch:
    """Tile sizes of the dX kernel."""
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)


def weight_tiles(dtype: torch.dtype) -> Launch:
    """Tile sizes of the dW kernel; float32 does not use tensor cores, and deep tiles would spill registers."""
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)


def row_splits(tiles: int, count: int, processors: int) -> int:
    """Number of parts that dW splits its rows into: full waves of tiles against the traffic of the partial sums."""

    def cost(splits: int) -> float:
        return triton.cdiv(tiles * splits, processors) * processors / (tiles * splits) + 0.02 * splits

    return min(range(1, max(2, min(9, count // 512 + 1))), key=cost)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    normalizer: Tensor | None,
    skip_absent: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sign (M, outputs) int8, scale), as `pite_kernels.trajectory.trajectory_forward` returns them."""
    count, (outputs, depth) = rows.numel(), weight.shape
    sign = hidden.new_empty((count, outputs), dtype=torch.int8)
    tiles = forward_tiles(hidden.dtype, count, outputs, multiprocessors(hidden.device))
    grid = triton.cdiv(count, tiles["BLOCK_M"]) * triton.cdiv(outputs, tiles["BLOCK_N"])
    partial = hidden.new_empty((3, grid), dtype=torch.float32)
    if grid:
        trajectory_l1_fwd_kernel[(grid,)](
            hidden,
            weight.to(hidden.dtype).contiguous(),
            bias,
            targets.contiguous(),
            rows.contiguous(),
            sign,
            partial,
            count,
            hidden.shape[0],
            hidden.stride(0),
            depth,
            outputs,
            SKIP_ABSENT=skip_absent,
            EVEN_K=depth % tiles["BLOCK_K"] == 0,
            **tiles,
            **FUSION,
        )
    loss, scale = finish_loss(partial, normalizer, _INVALID)
    return loss, sign, scale


def write_grad_hidden(
    grad_hidden: Tensor, coefficient: Tensor, weight: Tensor, sign: Tensor, rows: Tensor, accumulate: bool
) -> None:
    """grad_hidden[rows] += coefficient * sign W; without `accumulate`, from zero, and all other rows become zero."""
    count, (outputs, depth) = rows.numel(), weight.shape
    num_rows = grad_hidden.shape[0]
    rows = rows.contiguous()
    head = rows.new_full((num_rows,), -1, dtype=torch.int32)
    link = rows.new_empty(count, dtype=torch.int32)
    if count:
        grid = (triton.cdiv(count, 256),)
        trajectory_l1_bwd_link_rows_kernel[grid](rows, head, link, count, num_rows, BLOCK=256, num_warps=4, **FUSION)
    if not accumulate:
        zero_rows(grad_hidden, head, -1)
    if not count:
        return
    tiles = hidden_tiles(grad_hidden.dtype)
    trajectory_l1_bwd_dx_kernel[(triton.cdiv(count, tiles["BLOCK_M"]) * triton.cdiv(depth, tiles["BLOCK_N"]),)](
        grad_hidden,
        coefficient,
        weight.to(grad_hidden.dtype).contiguous(),
        sign,
        rows,
        head,
        link,
        count,
        num_rows,
        depth,
        outputs,
        ACCUMULATE=accumulate,
        **tiles,
        **FUSION,
    )


def grad_weight(coefficient: Tensor, hidden: Tensor, weight: Tensor, sign: Tensor, rows: Tensor) -> Tensor:
    """coefficient * sign' hidden[rows] in the weight's dtype, accumulated in float32."""
    count, (outputs, depth) = rows.numel(), weight.shape
    tiles = weight_tiles(hidden.dtype)
    grid = triton.cdiv(outputs, tiles["BLOCK_M"]) * triton.cdiv(depth, tiles["BLOCK_N"])
    splits = row_splits(grid, count, multiprocessors(hidden.device))
    chunk = triton.cdiv(triton.cdiv(max(count, 1), splits), tiles["BLOCK_K"]) * tiles["BLOCK_K"]
    partial = hidden.new_empty((splits, outputs, depth), dtype=torch.float32)
    trajectory_l1_bwd_dw_kernel[(grid, splits)](
        partial,
        hidden,
        sign,
        rows.contiguous(),
        count,
        hidden.shape[0],
        hidden.stride(0),
        depth,
        outputs,
        chunk,
        **tiles,
        **FUSION,
    )
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    numel = outputs * depth
    trajectory_l1_bwd_dw_sum_kernel[(triton.cdiv(numel, 2048),)](
        partial, coefficient, out, splits, numel, BLOCK=2048, num_warps=4, **FUSION
    )
    return out
