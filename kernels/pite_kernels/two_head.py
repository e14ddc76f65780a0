"""Both losses of one hidden state in a single autograd node, so that the two heads share one gradient tensor.

As two nodes, each head would return a (T, d) gradient, mostly zeros, and autograd would add the two. Here the gradient
rows of the vocabulary head are scattered first, and those of the trajectory head are accumulated into the same tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pite_kernels.cross_entropy import check_cross_entropy, cross_entropy_forward, scatter_rows
from pite_kernels.dispatch import NAMESPACE, autocast, with_unit_stride, without_autocast
from pite_kernels.reference import accumulator
from pite_kernels.trajectory import (
    check_trajectory,
    empty_signs,
    fake_trajectory_grads,
    trajectory_forward,
    trajectory_parameter_grads,
    write_trajectory_grad,
)


def two_head_loss(
    hidden: Tensor,
    lm_weight: Tensor,
    target_ids: Tensor,
    target_rows: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    trajectory_rows: Tensor,
    *,
    label_smoothing: float,
    weight: float,
    normalizers: tuple[Tensor | None, Tensor | None],
    absent: str = "skip",
) -> tuple[Tensor, Tensor, Tensor]:
    """(ce + weight * l1, ce, l1): `linear_cross_entropy` and `trajectory_l1` on the same hidden states (T, d).

    lm_weight (V, d), target_ids (L,), target_rows (L,)                      as in `linear_cross_entropy`
    head_weight (P * N * 2, d), head_bias, targets (M, P, N, 2), trajectory_rows (M,)   as in `trajectory_l1`
    weight       lambda of the loss, a number
    normalizers  0-dim tensors: supervised tokens and present coordinates of the global batch; None: those of this call
    Each of the three 0-dim results can be differentiated. Raises the ValueErrors of the two losses.
    """
    check_cross_entropy(hidden, lm_weight, target_ids, target_rows, None, label_smoothing, normalizers[0])
    check_trajectory(hidden, head_weight, head_bias, targets, trajectory_rows, normalizers[1], absent)
    hidden = with_unit_stride(autocast(hidden))
    track = torch.is_grad_enabled()
    outputs = two_head_forward(
        hidden,
        lm_weight,
        target_ids,
        target_rows,
        head_weight,
        head_bias,
        targets,
        trajectory_rows,
        label_smoothing,
        weight,
        normalizers[0],
        normalizers[1],
        absent == "skip",
        track and hidden.requires_grad,
        track and lm_weight.requires_grad,
    )
    return outputs[0], outputs[1], outputs[2]


@torch.library.custom_op(f"{NAMESPACE}::two_head_loss", mutates_args=())
@without_autocast
def two_head_forward(
    hidden: Tensor,
    lm_weight: Tensor,
    target_ids: Tensor,
    target_rows: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    trajectory_rows: Tensor,
    label_smoothing: float,
    weight: float,
    ce_normalizer: Tensor | None,
    l1_normalizer: Tensor | None,
    skip_absent: bool,
    need_hidden: bool,
    need_lm_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, ce, l1, ce scale, l1 scale, dX of the supervised rows, dW of the vocabulary head, sign)."""
    ce, ce_scale, dx, dw, _, _ = cross_entropy_forward(
        hidden,
        lm_weight,
        None,
        target_ids,
        target_rows,
        ce_normalizer,
        None,
        label_smoothing,
        -100,
        need_hidden,
        need_lm_weight,
        False,
    )
    l1, sign, l1_scale = trajectory_forward(
        hidden, head_weight, head_bias, targets, trajectory_rows, l1_normalizer, skip_absent
    )
    return ce + weight * l1, ce, l1, ce_scale, l1_scale, dx, dw, sign


@two_head_forward.register_fake
def _(
    hidden: Tensor, lm_weight: Tensor, target_ids: Tensor, target_rows: Any, head_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (_, _, trajectory_rows), (need_hidden, need_lm_weight) = rest[:3], rest[-2:]
    dtype = accumulator(hidden.dtype)
    loss, ce, l1, ce_scale, l1_scale = (hidden.new_empty((), dtype=dtype) for _ in range(5))
    dx = hidden.new_empty((target_ids.shape[0], hidden.shape[1]) if need_hidden else 0)
    dw = hidden.new_empty(lm_weight.shape if need_lm_weight else 0, dtype=dtype)
    sign = empty_signs(hidden, head_weight, trajectory_rows)
    return loss, ce, l1, ce_scale, l1_scale, dx, dw, sign


@torch.library.custom_op(f"{NAMESPACE}::two_head_backward", mutates_args=())
@without_autocast
def two_head_backward(
    ce_coefficient: Tensor,
    l1_coefficient: Tensor,
    dx: Tensor,
    target_rows: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    sign: Tensor,
    trajectory_rows: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, head_weight and head_bias; a gradient that is not needed is an empty tensor."""
    grad_hidden = hidden.new_empty(0)
    if need_hidden:
        grad_hidden = scatter_rows(dx, target_rows, ce_coefficient, hidden.shape[0])
        write_trajectory_grad(grad_hidden, l1_coefficient, head_weight, sign, trajectory_rows, accumulate=True)
    grad_weight, grad_bias = trajectory_parameter_grads(
        l1_coefficient, hidden, head_weight, sign, trajectory_rows, need_weight, need_bias
    )
    return grad_hidden, grad_weight, grad_bias


@two_head_backward.register_fake
def _(
    ce: Any, l1: Any, dx: Any, target_rows: Any, hidden: Tensor, weight: Tensor, sign: Any, rows: Any, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_trajectory_grads(hidden, weight, *needs)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, lm_weight, _, target_rows, head_weight, head_bias, _, trajectory_rows, _, weight, *_ = inputs
    *_, ce_scale, l1_scale, dx, dw, sign = output
    ctx.mark_non_differentiable(ce_scale, l1_scale, dx, dw, sign)
    ctx.save_for_backward(hidden, head_weight, target_rows, trajectory_rows, ce_scale, l1_scale, dx, dw, sign)
    ctx.weight, ctx.lm_dtype = weight, lm_weight.dtype
    ctx.bias_dtype = None if head_bias is None else head_bias.dtype


def _backward(ctx, grad_loss, grad_ce, grad_l1, *_unused):  # type: ignore[no-untyped-def]
    hidden, head_weight, target_rows, trajectory_rows, ce_scale, l1_scale, dx, dw, sign = ctx.saved_tensors
    ce_coefficient = (grad_loss + grad_ce) * ce_scale
    l1_coefficient = (grad_loss * ctx.weight + grad_l1) * l1_scale
    needs = ctx.needs_input_grad
    wanted = needs[0], needs[4], needs[5]
    grads = two_head_backward(
        ce_coefficient, l1_coefficient, dx, target_rows, hidden, head_weight, sign, trajectory_rows, *wanted
    )
    grad_hidden, grad_weight, grad_bias = (g if want else None for g, want in zip(grads, wanted))
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    grad_lm = (dw * ce_coefficient).to(ctx.lm_dtype) if needs[1] else None
    return grad_hidden, grad_lm, None, None, grad_weight, grad_bias, *[None] * 9


two_head_forward.register_autograd(_backward, setup_context=_setup_context)
