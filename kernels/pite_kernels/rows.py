"""Gathering rows that several documents read, with a deterministic backward pass.

The gradient of a row is the sum over its copies. `index_add` on CUDA adds them with atomics, in any order and in the
dtype of the gradient. Here the caller lists the copies of each row once (CSR), and backward adds them in the order of
that list, in float32 for half precision. Only the lists are saved for backward, neither x nor its copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pite_kernels.dispatch import NAMESPACE, uses_triton


class RowIndex(NamedTuple):
    """Which of T rows to gather, and where each row was copied to.

    rows     (K,) int64 in [0, T)
    inverse  (K,) int64, the positions in `rows`, ordered by the row that stands there
    offsets  (T + 1,) int64: row t was copied to inverse[offsets[t]:offsets[t + 1]]
    """

    rows: Tensor
    inverse: Tensor
    offsets: Tensor


def row_index(rows: Tensor, count: int) -> RowIndex:
    """The index of gathering `rows` (K,) int64 from `count` rows. It sorts: make it once per step, on the CPU."""
    offsets = rows.new_zeros(count + 1)
    offsets[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return RowIndex(rows, rows.argsort(stable=True), offsets)


def gather_rows(x: Tensor, index: RowIndex) -> Tensor:
    """x[index.rows]: (T, ...) -> (K, ...). Raises ValueError if the index was made for another number of rows."""
    if len(index.offsets) != len(x) + 1:
        raise ValueError(f"gather_rows: an index of {len(index.offsets) - 1} rows does not fit x {tuple(x.shape)}")
    if torch.compiler.is_compiling():
        return gather_rows_forward(x, *index)
    return _GatherRows.apply(x, *index)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] for (R,) int64 rows without repetition: (T, ...) -> (R, ...); backward writes, and adds nothing."""
    return _TakeRows.apply(x, rows)


def put_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """The inverse of `take_rows`: x (R, ...) in its rows of a (count, ...) tensor that is zero elsewhere."""
    return _PutRows.apply(x, rows, count)


def _matrix(rows: Tensor) -> Tensor:
    """Rows (T, ...) as (T, width)."""
    return rows[:, None] if rows.dim() == 1 else rows.flatten(1)


def sum_rows(grad: Tensor, inverse: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """Row t of the result (T, ...) is the sum of the rows inverse[offsets[t]:offsets[t + 1]] of grad (K, ...).

    out  written if given, and returned; its rows may be at any distance, without gaps inside a row
    """
    flat, count = _matrix(grad).contiguous(), len(offsets) - 1
    if uses_triton(grad):
        from pite_kernels.gpu import rows as gpu

        out = grad.new_empty(count, *grad.shape[1:]) if out is None else out
        with torch.cuda.device_of(grad):
            gpu.sum_rows(flat, inverse, offsets, _matrix(out))
        return out
    total = F.embedding_bag(inverse, flat, offsets, mode="sum", include_last_offset=True)
    total = total.view(count, *grad.shape[1:])
    return total if out is None else out.copy_(total)


@torch.library.custom_op(f"{NAMESPACE}::gather_rows", mutates_args=())
def gather_rows_forward(x: Tensor, rows: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
    return x.index_select(0, rows)


@gather_rows_forward.register_fake
def _(x: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return x.new_empty(rows.shape[0], *x.shape[1:])


@torch.library.custom_op(f"{NAMESPACE}::gather_rows_backward", mutates_args=())
def gather_rows_backward(grad: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
    return sum_rows(grad, inverse, offsets)


@gather_rows_backward.register_fake
def _(grad: Tensor, inverse: Any, offsets: Tensor) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, *grad.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, _, inverse, offsets = inputs
    ctx.save_for_backward(inverse, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gather_rows_backward(grad, *ctx.saved_tensors), None, None, None


gather_rows_forward.register_autograd(_backward, setup_context=_setup_context)


class _GatherRows(torch.autograd.Function):
    """The operator without torch.library's host time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, offsets)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows(grad, *ctx.saved_tensors), None, None, None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy_(0, rows, grad), None


class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows), None, None
