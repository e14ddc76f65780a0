"""The kernels of the trajectory L1 loss: three GEMMs over the M selected rows, with the elementwise work in their epilogues.

forward   P = X W', kept in registers; writes the signs S of P + b - t and one partial loss per tile
dX        S W, written or accumulated directly into the selected rows of a (T, d) gradient
dW        S' X with gathered rows of X, split along the rows into float32 partials, which are summed in a fixed order

The signs have the dtype of hidden and zeros up to a width that K-steps divide. The tensor cores then take them from
shared memory, where asynchronous loads put them. With one byte per sign, a K-step of dX would convert them in 300
instructions more than the tensor cores have time for.

Several targets may select the same row. A linked list (head, next) joins them. The signs of a list with more than one
target are summed into the row of the list's head in a second buffer, from which dX reads them, and the head's row of dX
is the only one that is written. So there are no floating-point atomics, and the sum of integers does not depend on the
order of the list. In bfloat16 the sums are exact up to 256 targets of one row.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x):
    """The left and right half of the columns of x (rows, columns)."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def l1_epilogue(
    prediction,
    bias_ptr,
    target_ptr,
    sign_ptr,
    m,
    column,
    inside,
    count,
    outputs: tl.constexpr,
    WIDTH: tl.constexpr,
    SKIP_ABSENT: tl.constexpr,
    EACH: tl.constexpr,
):
    """Store the signs of prediction - target; (distances, summed over all or with EACH over columns, counted, invalid)."""
    n = column + tl.arange(0, prediction.shape[1])
    keep = (m < count)[:, None] & (n < outputs)[None, :]
    target = tl.load(target_ptr + m[:, None] * outputs + n[None, :], mask=keep, other=0.0).to(
        tl.float32
    )  # (BLOCK_M, columns)
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
    sign = (distance > 0).to(tl.float32) - (distance < 0).to(tl.float32)  # 0 in the columns from `outputs` on
    sign = sign.to(sign_ptr.dtype.element_ty)
    tl.store(sign_ptr + m[:, None] * WIDTH + n[None, :], sign, mask=(m < count)[:, None] & (n < WIDTH)[None, :])
    total = tl.sum(tl.abs(distance), 1) if EACH else tl.sum(tl.abs(distance))
    return total, counted, invalid


@triton.jit(do_not_specialize=["count", "num_rows"])
def trajectory_l1_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    rows_ptr,
    sign_ptr,
    partial_ptr,
    each_ptr,
    count,
    num_rows,
    stride,
    depth,
    outputs: tl.constexpr,
    WIDTH: tl.constexpr,
    SKIP_ABSENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: the tile of BLOCK_M targets and BLOCK_N outputs of |X W' + b - t|; its signs and partial sums.

    hidden (T, d) with row stride `stride`, rows (M,) int64, weight (O, d), bias (O,) or None, target (M, O)
    sign (M, WIDTH), 0 from column O on;  partial (3, programs) float32: loss, coordinates counted, invalid coordinates
    each (M, tiles of columns) float32: the sum of a target's distances in a tile, or None
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
    sign_ptr += tl.cast(first, tl.int64) * WIDTH
    EACH: tl.constexpr = each_ptr is not None
    total, counted, invalid = tl.zeros([BLOCK_M], tl.float32) if EACH else 0.0, 0, 0
    for i in tl.static_range(len(pieces)):
        sums = l1_epilogue(
            pieces[i], bias_ptr, target_ptr, sign_ptr, m, column, inside, count, outputs, WIDTH, SKIP_ABSENT, EACH
        )
        total += sums[0]
        counted += sums[1]
        invalid += sums[2]
        column += pieces[i].shape[1]
    tile = partial_ptr + tl.program_id(0)
    tiles = tl.num_programs(0)
    if EACH:
        at = each_ptr + (tl.cast(first, tl.int64) + m) * tiles_n + tl.program_id(0) % tiles_n
        tl.store(at, total, mask=m < count)
        total = tl.sum(total)
    tl.store(tile, total)
    tl.store(tile + tiles, tl.cast(counted, tl.float32))
    tl.store(tile + 2 * tiles, tl.cast(invalid, tl.float32))


@triton.jit(do_not_specialize=["count", "num_rows"])
def trajectory_l1_bwd_link_rows_kernel(rows_ptr, head_ptr, next_ptr, count, num_rows, BLOCK: tl.constexpr):
    """One program: puts each of BLOCK targets at the head of the linked list of its row.

    rows (count,) int64; head (num_rows,) int32: the first target of each row, or -1; next (count,) int32: -1 at the end
    """
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + m, mask=m < count, other=-1)  # (BLOCK,)
    inside = (row >= 0) & (row < num_rows)
    before = tl.atomic_xchg(head_ptr + row, m, mask=inside)
    tl.store(next_ptr + m, tl.where(inside, before, -1), mask=m < count)


@triton.jit(do_not_specialize=["count"])
def trajectory_l1_bwd_merge_signs_kernel(
    sign_ptr, merged_ptr, next_ptr, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: ROWS targets and BLOCK columns; for each target with a next one, the sum of the signs from it to the list's end.

    sign and merged (count, WIDTH), next (count,) int32: the next target in the list of a row, or -1. The rows of
    `merged` whose target has no next one in its list are not written.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(next_ptr + m, mask=m < count, other=-1)  # (ROWS,)
    if tl.max(at) >= 0:
        linked = at >= 0
        own = m[:, None].to(tl.int64) * WIDTH + n[None, :]
        keep = linked[:, None] & (n < WIDTH)[None, :]
        total = tl.load(sign_ptr + own, mask=keep, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
        while tl.max(at) >= 0:
            also = at[:, None].to(tl.int64) * WIDTH + n[None, :]
            total += tl.load(sign_ptr + also, mask=(at >= 0)[:, None] & (n < WIDTH)[None, :], other=0.0).to(tl.float32)
            at = tl.load(next_ptr + at, mask=at >= 0, other=-1)  # (ROWS,)
        tl.store(merged_ptr + own, total.to(merged_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["count", "num_rows"])
def trajectory_l1_bwd_dx_kernel(
    grad_ptr,
    coefficient_ptr,
    weight_ptr,
    sign_ptr,
    merged_ptr,
    rows_ptr,
    head_ptr,
    next_ptr,
    count,
    num_rows,
    depth,
    outputs: tl.constexpr,
    WIDTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M targets and BLOCK_N columns of dX = coefficient * S W, written to the rows of grad.

    grad (T, d), coefficient 0-dim, weight (O, d), sign and merged (M, WIDTH), rows (M,) int64
    head (T,) and next (M,) int32 are the linked lists. Of the targets of one row, only the list's head writes: its own
    signs if it has no next one, else the sums in `merged`. Sizes as in trajectory_l1_fwd_kernel.
    """
    tiles_n = tl.cdiv(depth, BLOCK_N)
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles_n) * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Targets from `count` on load the last one's signs and write nothing, so that loads of signs need no mask.
    link = tl.load(next_ptr + m, mask=m < count, other=-1)  # (BLOCK_M,)
    own = tl.minimum(m, count - 1).to(tl.int64) * WIDTH
    # Triton 3.9 does not see that both pointers are aligned, and would load signs one by one.
    s_ptr = tl.multiple_of(tl.where(link >= 0, merged_ptr + own, sign_ptr + own), 16)[:, None] + k[None, :]
    w_ptr = weight_ptr + k[:, None].to(tl.int64) * depth + n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, outputs, BLOCK_K):
        s = tl.load(s_ptr)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptr, mask=(k[:, None] < outputs - start) & (n < depth)[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(s, w, acc, input_precision="ieee")
        s_ptr += BLOCK_K
        w_ptr += BLOCK_K * depth
    acc *= tl.load(coefficient_ptr)  # scalar
    row = tl.load(rows_ptr + m, mask=m < count, other=-1)  # (BLOCK_M,)
    inside = (row >= 0) & (row < num_rows)
    owner = inside & (tl.load(head_ptr + row, mask=inside, other=-1) == m)  # (BLOCK_M,)
    grad_ptr += row[:, None] * depth
    # In pieces, as in the forward kernel.
    left, right = halves(acc)
    pieces = halves(left) + halves(right)
    for i in tl.static_range(len(pieces)):
        piece = pieces[i]  # (BLOCK_M, BLOCK_N / 4)
        n = column + i * piece.shape[1] + tl.arange(0, piece.shape[1])
        keep = owner[:, None] & (n < depth)[None, :]
        if ACCUMULATE:
            piece += tl.load(grad_ptr + n[None, :], mask=keep, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N / 4)
        tl.store(grad_ptr + n[None, :], piece.to(grad_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["count", "num_rows", "chunk"])
def trajectory_l1_bwd_dw_kernel(
    partial_ptr,
    hidden_ptr,
    sign_ptr,
    rows_ptr,
    count,
    num_rows,
    stride,
    depth,
    chunk,
    outputs: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M outputs and BLOCK_N columns of S' X, summed over `chunk` targets (one split).

    partial (splits, O, d) float32, hidden (T, d) with row stride `stride`, sign (M, WIDTH), rows (M,) int64
    """
    tiles_n = tl.cdiv(depth, BLOCK_N)
    o = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles_n) * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, count)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        row = tl.load(rows_ptr + m, mask=m < last, other=-1)  # (BLOCK_K,)
        inside = (row >= 0) & (row < num_rows)
        s_ptr = sign_ptr + m[:, None].to(tl.int64) * WIDTH + o[None, :]
        s = tl.load(s_ptr, mask=inside[:, None] & (o < WIDTH)[None, :], other=0.0)  # (BLOCK_K, BLOCK_M)
        x_ptr = hidden_ptr + row[:, None] * stride + n[None, :]
        x = tl.load(x_ptr, mask=inside[:, None] & (n < depth)[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(tl.trans(s), x, acc, input_precision="ieee")
    partial_ptr += (tl.program_id(1).to(tl.int64) * outputs + o[:, None]) * depth
    left, right = halves(acc)
    pieces = halves(left) + halves(right)
    for i in tl.static_range(len(pieces)):
        n = column + i * pieces[i].shape[1] + tl.arange(0, pieces[i].shape[1])
        tl.store(partial_ptr + n[None, :], pieces[i], mask=(o < outputs)[:, None] & (n < depth)[None, :])


@triton.jit(do_not_specialize=["splits"])
def trajectory_l1_bwd_dw_sum_kernel(partial_ptr, coefficient_ptr, out_ptr, splits, numel, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of dW, out (numel,) = coefficient * the sum of partial (splits, numel) over splits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + at, mask=at < numel, other=0.0)  # (BLOCK,)
        partial_ptr += numel
    total *= tl.load(coefficient_ptr)  # scalar
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < numel)
