"""Masked L1 loss between projected hidden states and trajectories, without storing all predictions.

The gradient of |p - t| is -1, 0 or 1. So the forward pass keeps only the sign of each coordinate (S), and the backward
pass is two GEMMs on the signs, scaled by a scalar: dX = S W and dW = S' X. On the CPU a sign takes a byte. On CUDA it
has the dtype of hidden, because tensor cores multiply it without a conversion. Rows without a trajectory are never read. The
price: the loss can be differentiated only once, which is enough to train with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pite_kernels.checks import (
    check_devices,
    check_hidden,
    check_normalizer,
    check_reduction,
    check_weights,
    validate_rows,
)
from pite_kernels.dispatch import NAMESPACE, autocast, cpp, uses_triton, with_unit_stride, without_autocast
from pite_kernels.reference import accumulator, reciprocal


def trajectory_l1(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    *,
    normalizer: Tensor | None = None,
    absent: str = "skip",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """sum w |hidden[rows] W' + b - targets| / normalizer, over the present coordinates (PiTe eq. 8).

    hidden      (T, d)          bf16, fp16, fp32 or fp64; any row stride, unit stride last. Under `torch.autocast` it
                                is cast to that dtype
    weight      (P * N * 2, d)  any of those dtypes;  bias (P * N * 2,) or None
    targets     (M, P, N, 2)    coordinates in [0, 1]; a pair equal to (-1, -1) is absent
    rows        (M,) int64      the row of `hidden` that predicts each target; may repeat
    normalizer  0-dim tensor    coordinates counted in the global batch (x and y one each); None: the sum of w over those
                                of this call
    absent      "skip": an absent pair has no loss and is not counted; "regress": -1 is an ordinary target
    weights     (M,)            floating, without gradients: w, the weight of each target; None: 1
    reduction   "mean", or "none" for (M,): w times the sum of each target's distances
    Returns a 0-dim loss, float32 (float64 from float64 inputs); 0 with zero gradients where the normalizer is 0.
    Gradients are accumulated in float32 and returned in each input's dtype. Raises ValueError on a shape or dtype that
    does not fit and, on the CPU, on non-finite targets, half-absent pairs and rows out of range. On CUDA these cause a
    device-side assert, because reading them would synchronize with the GPU.
    """
    check_trajectory(hidden, weight, bias, targets, rows, normalizer, absent)
    check_weights("trajectory_l1", weights, targets, normalizer, reduction)
    hidden = with_unit_stride(autocast(hidden))
    # In half precision a sum of weights rounds, or overflows.
    weights = None if weights is None else weights.to(accumulator(hidden.dtype))
    skip = absent == "skip"
    if weights is None and reduction == "mean":
        loss, _, _ = trajectory_forward(hidden, weight, bias, targets, rows, normalizer, skip)
        return loss
    losses, _ = target_losses(hidden, weight, bias, targets, rows, skip)
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    if normalizer is None:
        assert weights is not None, "the plain mean is above"
        counted = (targets != -1) if skip else torch.ones_like(targets, dtype=torch.bool)
        normalizer = (weights * counted.flatten(1).sum(1)).sum()
    return losses.sum() * reciprocal(normalizer.to(losses.dtype))


class FusedTrajectoryL1Loss(nn.Module):
    """`trajectory_l1` as a module, with the same options `absent` and `reduction`."""

    def __init__(self, absent: str = "skip", reduction: str = "mean") -> None:
        super().__init__()
        if absent not in ("skip", "regress"):
            raise ValueError(f"absent must be 'skip' or 'regress', not {absent!r}")
        check_reduction("trajectory_l1", reduction)
        self.absent = absent
        self.reduction = reduction

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        normalizer: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return trajectory_l1(
            hidden,
            weight,
            bias,
            targets,
            rows,
            normalizer=normalizer,
            absent=self.absent,
            weights=weights,
            reduction=self.reduction,
        )


def check_trajectory(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    normalizer: Tensor | None,
    absent: str,
) -> None:
    """Raise ValueError unless shapes, dtypes and options fit. Reads no tensor values."""
    check_hidden("trajectory_l1", hidden, weight)
    if targets.dim() != 4 or targets.shape[-1] != 2 or not targets.is_floating_point():
        raise ValueError(f"trajectory_l1: targets must be floating (M, P, N, 2), not {tuple(targets.shape)}")
    outputs = targets[0].numel() if targets.shape[0] else targets.shape[1] * targets.shape[2] * 2
    if weight.shape[0] != outputs:
        raise ValueError(f"trajectory_l1: weight has {weight.shape[0]} rows, targets need P * N * 2 = {outputs}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"trajectory_l1: bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    if rows.dtype != torch.int64 or rows.shape != targets.shape[:1]:
        raise ValueError(f"trajectory_l1: rows must be int64 ({targets.shape[0]},), not {tuple(rows.shape)}")
    if absent not in ("skip", "regress"):
        raise ValueError(f"trajectory_l1: absent must be 'skip' or 'regress', not {absent!r}")
    check_normalizer("trajectory_l1", normalizer)
    check_devices("trajectory_l1", hidden, bias, targets, rows, normalizer)


@torch.library.custom_op(f"{NAMESPACE}::trajectory_l1", mutates_args=())
@without_autocast
def trajectory_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    normalizer: Tensor | None,
    skip_absent: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, sign, scale = 1 / normalizer); `empty_signs` has the shape and dtype of sign."""
    if uses_triton(hidden):
        from pite_kernels.gpu import trajectory as gpu

        with torch.cuda.device_of(hidden):
            return gpu.forward(hidden, weight, bias, targets, rows, normalizer, skip_absent)[:3]
    validate_rows("trajectory_l1", rows, hidden.shape[0])
    dtype = accumulator(hidden.dtype)
    flat = targets.reshape(rows.numel(), weight.shape[0]).to(dtype).contiguous()
    bias = bias if bias is None else bias.to(dtype)
    native = cpp(hidden)
    if native is not None:
        total, count, bad, sign = native.trajectory_forward(
            hidden, weight.float().contiguous(), bias, flat, rows, skip_absent
        )
        if bad:
            validate_targets(targets, skip_absent)
    else:
        validate_targets(targets, skip_absent)
        distance = _distances(hidden, weight, bias, flat, rows, skip_absent)
        sign = distance.sign().to(torch.int8)
        total = distance.abs_().sum()
        count = (flat != -1).sum() if skip_absent else hidden.new_tensor(flat.numel())
    scale = reciprocal((count if normalizer is None else normalizer).to(dtype))
    return total * scale, sign, scale


def _distances(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, flat: Tensor, rows: Tensor, skip_absent: bool
) -> Tensor:
    """Predictions minus targets (M, P * N * 2), 0 where a target is absent."""
    distance = project(hidden.index_select(0, rows), weight, bias).sub_(flat)
    return distance.masked_fill_(flat == -1, 0) if skip_absent else distance


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b in the accumulator dtype; the product x W' is first rounded to x's dtype, as a GEMM does."""
    predictions = torch.mm(x, weight.to(x.dtype).t()).to(accumulator(x.dtype))
    return predictions if bias is None else predictions.add_(bias)


@trajectory_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, targets: Any, rows: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(hidden.dtype)
    return hidden.new_empty((), dtype=dtype), empty_signs(hidden, weight, rows), hidden.new_empty((), dtype=dtype)


def empty_signs(hidden: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Uninitialized signs of all coordinates, for fake kernels.

    (M, P * N * 2) int8; on CUDA hidden's dtype, with more columns: zeros that fill the last K-step
    """
    if uses_triton(hidden):
        from pite_kernels.gpu import trajectory as gpu

        return gpu.empty_signs(hidden, rows.shape[0], weight.shape[0])
    return hidden.new_empty((rows.shape[0], weight.shape[0]), dtype=torch.int8)


@torch.library.custom_op(f"{NAMESPACE}::trajectory_l1_backward", mutates_args=())
@without_autocast
def trajectory_backward(
    coefficient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    sign: Tensor,
    rows: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) of coefficient * sum(sign * predictions); a gradient that is not needed is an empty tensor.

    coefficient  0-dim: the upstream gradient times the scale from the forward pass
    db has the accumulator dtype.
    """
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    if need_hidden:
        write_trajectory_grad(grad_hidden, coefficient, weight, sign, rows, accumulate=False)
    grad_weight, grad_bias = trajectory_parameter_grads(coefficient, hidden, weight, sign, rows, need_weight, need_bias)
    return grad_hidden, grad_weight, grad_bias


@trajectory_backward.register_fake
def _(
    coefficient: Any, hidden: Tensor, weight: Tensor, sign: Any, rows: Any, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_trajectory_grads(hidden, weight, *needs)


def fake_trajectory_grads(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized gradients of hidden, weight and bias, in the shapes and dtypes that both backward ops return."""
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=accumulator(hidden.dtype)),
    )


def write_trajectory_grad(
    grad_hidden: Tensor, coefficient: Tensor, weight: Tensor, sign: Tensor, rows: Tensor, *, accumulate: bool
) -> None:
    """grad_hidden[rows] += coefficient * sign W, bitwise reproducible; without `accumulate` it starts from zero."""
    if uses_triton(grad_hidden):
        from pite_kernels.gpu import trajectory as gpu

        with torch.cuda.device_of(grad_hidden):
            gpu.write_grad_hidden(grad_hidden, coefficient, weight, sign, rows, accumulate)
        return
    native = cpp(grad_hidden)
    if native is not None and sign.dtype == torch.int8:
        weight = weight.float().contiguous()
        native.trajectory_grad_hidden(grad_hidden, coefficient, weight, sign, rows, accumulate)
        return
    if not accumulate:
        grad_hidden.zero_()
    compact = torch.mm(sign.to(grad_hidden.dtype), weight.to(grad_hidden.dtype)).to(coefficient.dtype) * coefficient
    grad_hidden.index_add_(0, rows, compact.to(grad_hidden.dtype))


def trajectory_parameter_grads(
    coefficient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    sign: Tensor,
    rows: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """(coefficient * sign' X in the weight's dtype, coefficient * the column sums of sign)."""
    dtype = accumulator(hidden.dtype)
    grad_weight, grad_bias = weight.new_empty(0), hidden.new_empty(0, dtype=dtype)
    if need_bias:
        # Float32 counts exactly up to 2^24 rows, and it is the fastest dtype of a sum on CUDA.
        grad_bias = sign.sum(0, dtype=dtype)[: weight.shape[0]] * coefficient
    if need_weight and uses_triton(hidden):
        from pite_kernels.gpu import trajectory as gpu

        with torch.cuda.device_of(hidden):
            grad_weight = gpu.grad_weight(coefficient, hidden, weight, sign, rows)
    elif need_weight and sign.dtype == torch.int8 and (native := cpp(hidden)) is not None:
        grad_weight = native.trajectory_grad_weight(coefficient, hidden, sign, rows).to(weight.dtype)
    elif need_weight:
        selected = hidden.index_select(0, rows).to(dtype)
        grad_weight = (torch.mm(sign.t().to(dtype), selected) * coefficient).to(weight.dtype)
    return grad_weight, grad_bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, _, rows, _, _ = inputs
    _, sign, scale = output
    ctx.mark_non_differentiable(sign, scale)
    ctx.save_for_backward(hidden, weight, sign, rows, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_loss, _grad_sign, _grad_scale):  # type: ignore[no-untyped-def]
    hidden, weight, sign, rows, scale = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    grads = trajectory_backward(grad_loss * scale, hidden, weight, sign, rows, *needs)
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs))
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_hidden, grad_weight, grad_bias, None, None, None, None


trajectory_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::trajectory_l1_targets", mutates_args=())
@without_autocast
def target_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, skip_absent: bool
) -> tuple[Tensor, Tensor]:
    """Returns (the sum of each target's distances (M,), sign); on the CPU in PyTorch."""
    if uses_triton(hidden):
        from pite_kernels.gpu import trajectory as gpu

        with torch.cuda.device_of(hidden):
            _, sign, _, losses = gpu.forward(hidden, weight, bias, targets, rows, None, skip_absent, each=True)
        return losses, sign
    validate_rows("trajectory_l1", rows, hidden.shape[0])
    validate_targets(targets, skip_absent)
    dtype = accumulator(hidden.dtype)
    flat = targets.reshape(rows.numel(), weight.shape[0]).to(dtype)
    distance = _distances(hidden, weight, None if bias is None else bias.to(dtype), flat, rows, skip_absent)
    return distance.abs().sum(1), distance.sign().to(torch.int8)


@target_losses.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, targets: Any, rows: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(rows.shape[0], dtype=accumulator(hidden.dtype))
    return losses, empty_signs(hidden, weight, rows)


def _targets_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, _, rows, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, output[1], rows)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _targets_backward(ctx, grad_losses, _grad_sign):  # type: ignore[no-untyped-def]
    hidden, weight, sign, rows = ctx.saved_tensors
    # The signs take each target's gradient as a share of the largest one, since half precision has no 1 / normalizer.
    largest = torch.cat([grad_losses.abs(), grad_losses.new_zeros(1)]).max()
    shares = grad_losses * reciprocal(largest)
    needs = tuple(ctx.needs_input_grad[:3])
    weighted = sign.to(hidden.dtype) * shares[:, None].to(hidden.dtype)
    grads = trajectory_backward(largest, hidden, weight, weighted, rows, *needs)
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs))
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_hidden, grad_weight, grad_bias, None, None, None


target_losses.register_autograd(_targets_backward, setup_context=_targets_setup_context)


def validate_targets(targets: Tensor, skip_absent: bool) -> None:
    """Raise ValueError with the first target that is not finite or, with skip_absent, has only one coordinate at -1."""
    x, y = targets.unbind(-1)
    half_absent = (x == -1) != (y == -1) if skip_absent else torch.zeros_like(x, dtype=torch.bool)
    if bool(targets.sum().isfinite()) and not bool(half_absent.any()):
        return
    bad = half_absent | ~(x.isfinite() & y.isfinite())
    m, p, n = (int(i) for i in bad.nonzero()[0])
    raise ValueError(
        f"trajectory_l1: target {m} (point {p}, frame {n}) is ({float(x[m, p, n])}, {float(y[m, p, n])}); "
        "give two coordinates, or (-1, -1) for absent"
    )
