"""The trajectory L1 loss on CUDA: tile sizes and launches of the kernels in `trajectory_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pite_kernels.gpu.shared import FUSION, Launch, finish_loss, multiprocessors, tile_of, zero_rows
from pite_kernels.gpu.trajectory_kernels import (
    trajectory_l1_bwd_dw_kernel,
    trajectory_l1_bwd_dw_sum_kernel,
    trajectory_l1_bwd_dx_kernel,
    trajectory_l1_bwd_link_rows_kernel,
    trajectory_l1_bwd_merge_signs_kernel,
    trajectory_l1_fwd_kernel,
)

_INVALID = "trajectory_l1: a target is not finite or half absent, or a row is out of range"


def forward_tiles(dtype: torch.dtype, count: int, outputs: int, processors: int) -> Launch:
    """Tile sizes of the forward kernel; half the height where full tiles are fewer than the multiprocessors."""
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=tile_of(outputs, 64), BLOCK_K=32, num_warps=4, num_stages=2)
    block_n = tile_of(outputs, 128)
    block_m = 128 if triton.cdiv(count, 128) * triton.cdiv(outputs, block_n) >= processors else 64
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, num_warps=8 if block_m == 128 else 4, num_stages=3)


def sign_step(dtype: torch.dtype, outputs: int) -> int:
    """Signs of a row per K-step of the dX kernel."""
    return tile_of(outputs, 32 if dtype == torch.float32 else 64)


def empty_signs(hidden: Tensor, count: int, outputs: int) -> Tensor:
    """Uninitialized signs of `count` targets: hidden's dtype, `outputs` columns rounded up to whole K-steps."""
    step = sign_step(hidden.dtype, outputs)
    return hidden.new_empty((count, triton.cdiv(outputs, step) * step))


def hidden_tiles(dtype: torch.dtype, outputs: int, depth: int) -> Launch:
    """Tile sizes of the dX kernel; narrower for a width whose rows are not aligned, which would spill registers."""
    step = sign_step(dtype, outputs)
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=step, num_warps=4, num_stages=2)
    return dict(BLOCK_M=128, BLOCK_N=64 if depth % 16 else 128, BLOCK_K=step, num_warps=8, num_stages=3)


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
    each: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, sign (M, width), scale), as `pite_kernels.trajectory.trajectory_forward` returns them.

    The fourth is, with `each`, the sum of each target's distances (M,), else empty.
    """
    count, (outputs, depth) = rows.numel(), weight.shape
    sign = empty_signs(hidden, count, outputs)
    tiles = forward_tiles(hidden.dtype, count, outputs, multiprocessors(hidden.device))
    tiles_n = triton.cdiv(outputs, tiles["BLOCK_N"])
    grid = triton.cdiv(count, tiles["BLOCK_M"]) * tiles_n
    partial = hidden.new_empty((3, grid), dtype=torch.float32)
    distances = partial.new_empty((count, tiles_n)) if each else None
    if grid:
        trajectory_l1_fwd_kernel[(grid,)](
            hidden,
            weight.to(hidden.dtype).contiguous(),
            bias,
            targets.contiguous(),
            rows.contiguous(),
            sign,
            partial,
            distances,
            count,
            hidden.shape[0],
            hidden.stride(0),
            depth,
            outputs,
            sign.shape[1],
            SKIP_ABSENT=skip_absent,
            EVEN_K=depth % tiles["BLOCK_K"] == 0,
            **tiles,
            **FUSION,
        )
    loss, scale = finish_loss(partial, normalizer, _INVALID)
    return loss, sign, scale, partial.new_empty(0) if distances is None else distances.sum(1)


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
        blocks = triton.cdiv(count, 256)
        trajectory_l1_bwd_link_rows_kernel[(blocks,)](
            rows, head, link, count, num_rows, BLOCK=256, num_warps=4, **FUSION
        )
    if not accumulate:
        zero_rows(grad_hidden, head, -1)
    if not count:
        return
    width, merged = sign.shape[1], torch.empty_like(sign)
    grid = (triton.cdiv(count, 64), triton.cdiv(width, 128))
    trajectory_l1_bwd_merge_signs_kernel[grid](
        sign, merged, link, count, width, ROWS=64, BLOCK=tile_of(width, 128), num_warps=4, **FUSION
    )
    tiles = hidden_tiles(grad_hidden.dtype, outputs, depth)
    trajectory_l1_bwd_dx_kernel[(triton.cdiv(count, tiles["BLOCK_M"]) * triton.cdiv(depth, tiles["BLOCK_N"]),)](
        grad_hidden,
        coefficient,
        weight.to(grad_hidden.dtype).contiguous(),
        sign,
        merged,
        rows,
        head,
        link,
        count,
        num_rows,
        depth,
        outputs,
        width,
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
        chunk,
        outputs,
        sign.shape[1],
        **tiles,
        **FUSION,
    )
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    numel = outputs * depth
    trajectory_l1_bwd_dw_sum_kernel[(triton.cdiv(numel, 2048),)](
        partial, coefficient, out, splits, numel, BLOCK=2048, num_warps=4, **FUSION
    )
    return out
