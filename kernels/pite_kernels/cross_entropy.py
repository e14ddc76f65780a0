"""Label-smoothed cross-entropy of a linear head, without full logits and only on the supervised rows.

Rows go through the head in chunks. The logits of a chunk become probabilities and then gradients in place, so only one
chunk of logits exists at a time. Gradients are computed in the forward pass, because recomputing the logits in backward
would take half as long again for a frozen head. The backward pass only scales and scatters them. A frozen head needs
two GEMMs. Smoothing is a rank-one correction: with c the mean of W's rows,
    loss = lse - (1 - eps) x.W_y - eps x.c        dX = p W - (1 - eps) W_y - eps c.
On CUDA this keeps eps / V, which is too small for half precision, out of p. On the CPU p is float32 and includes it.
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


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalizer: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """sum w CE(hidden[rows] W' + b, target_ids) / normalizer, smoothed as `torch.nn.functional.cross_entropy` does.

    hidden           (T, d)       bf16, fp16, fp32 or fp64; any row stride, unit stride last. Under `torch.autocast` it
                                  is cast to that dtype
    weight           (V, d)       any of those dtypes;  bias (V,) or None. A third less work when both are frozen
    target_ids       (L,) int64   in [0, V), or `ignore_index`
    rows             (L,) int64   the row of `hidden` that predicts each target, may repeat; None: target i is row i.
                                  On CUDA only `rows` skips the work of unsupervised rows: counting ignored ids would
                                  synchronize with the GPU
    label_smoothing  in [0, 1): eps / V for every token, plus 1 - eps for the target
    normalizer       0-dim tensor: supervised tokens of the global batch; None: the sum of w over those of this call
    weights          (L,) floating, without gradients: w, the weight of each target; None: 1
    reduction        "mean", or "none" for (L,) losses w CE, 0 where a target is ignored. If the head is trainable, "none"
                     computes the logits again in backward, because the weight of each loss is known only then
    Returns a 0-dim loss, float32 (float64 from float64 inputs); 0 with zero gradients where the normalizer is 0.
    Raises ValueError on a shape, dtype or option that does not fit and, on the CPU, on ids or rows out of range. On
    CUDA ids or rows out of range trigger a device-side assert.
    """
    check_cross_entropy(hidden, weight, target_ids, rows, bias, label_smoothing, normalizer)
    check_weights("linear_cross_entropy", weights, target_ids, normalizer, reduction)
    hidden = with_unit_stride(autocast(hidden))
    # In half precision a sum of weights rounds, or overflows.
    weights = None if weights is None else weights.to(accumulator(hidden.dtype))
    track = torch.is_grad_enabled()
    needs = [track and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if reduction == "none":
        losses, _ = token_losses(hidden, weight, bias, target_ids, rows, label_smoothing, ignore_index, needs[0])
        return losses if weights is None else losses * weights
    if weights is not None and normalizer is None:
        normalizer = torch.where(target_ids == ignore_index, 0, weights).sum()
    outputs = cross_entropy_forward(
        hidden, weight, bias, target_ids, rows, normalizer, weights, label_smoothing, ignore_index, *needs
    )
    return outputs[0]


class FusedLinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` as a module, with the same options."""

    def __init__(self, label_smoothing: float = 0.0, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        check_smoothing(label_smoothing)
        check_reduction("linear_cross_entropy", reduction)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        rows: Tensor | None = None,
        bias: Tensor | None = None,
        normalizer: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return linear_cross_entropy(
            hidden,
            weight,
            target_ids,
            rows,
            bias=bias,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=normalizer,
            weights=weights,
            reduction=self.reduction,
        )


def check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")


def check_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    label_smoothing: float,
    normalizer: Tensor | None,
) -> None:
    """Raise ValueError unless shapes, dtypes and options fit. Reads no tensor values."""
    check_hidden("linear_cross_entropy", hidden, weight)
    if target_ids.dtype != torch.int64 or target_ids.dim() != 1:
        raise ValueError(f"linear_cross_entropy: target_ids must be int64 (L,), not {tuple(target_ids.shape)}")
    count = hidden.shape[0] if rows is None else rows.shape[0]
    if target_ids.shape[0] != count or (rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64)):
        raise ValueError(f"linear_cross_entropy: {target_ids.shape[0]} target_ids for {count} rows (int64)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy: bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    check_smoothing(label_smoothing)
    check_normalizer("linear_cross_entropy", normalizer)
    check_devices("linear_cross_entropy", hidden, target_ids, rows, bias, normalizer)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=())
@without_autocast
def cross_entropy_forward(
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
    """Returns (loss, scale = 1 / normalizer, dX of the rows, dW, db, losses), the gradients of the sum before scaling.

    dX (L, d) has the dtype of hidden, dW (V, d) and db (V,) the accumulator dtype. A gradient that is not needed is an
    empty tensor. `losses` (L,) and dX are without `weights`; the loss, dW and db are with them.
    """
    if uses_triton(hidden):
        from pite_kernels.gpu import cross_entropy as gpu

        with torch.cuda.device_of(hidden):
            return gpu.forward(
                hidden,
                weight,
                bias,
                target_ids,
                rows,
                normalizer,
                weights,
                label_smoothing,
                ignore_index,
                need_hidden,
                need_weight,
                need_bias,
            )
    dtype = accumulator(hidden.dtype)
    vocabulary, depth = weight.shape
    supervised = target_ids != ignore_index
    ids = target_ids[supervised]
    validate_ids(ids, vocabulary)
    if rows is not None:
        validate_rows("linear_cross_entropy", rows, hidden.shape[0])
    slots = supervised.nonzero().flatten()
    selected = slots if rows is None else rows[slots]
    all_losses = hidden.new_zeros(target_ids.shape[0], dtype=dtype)
    w = None if weights is None else weights.to(dtype)
    grad_hidden = hidden.new_zeros((target_ids.shape[0], depth) if need_hidden else 0)
    grad_weight = hidden.new_zeros((vocabulary, depth) if need_weight else 0, dtype=dtype)
    grad_bias = hidden.new_zeros(vocabulary if need_bias else 0, dtype=dtype)
    head = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(dtype)
    chunk = max(64, min(4096, _LOGITS_PER_CHUNK // vocabulary))
    for part, y, slot in zip(selected.split(chunk), ids.split(chunk), slots.split(chunk)):
        x = hidden.index_select(0, part)
        logits = torch.mm(x, head.t()).to(dtype)
        losses, gradient = _softmax_rows(logits, bias, y, label_smoothing)
        all_losses.index_copy_(0, slot, losses)
        if need_hidden:
            grad_hidden.index_copy_(0, slot, torch.mm(gradient.to(hidden.dtype), head))
        if w is not None and (need_weight or need_bias):
            gradient *= w[slot, None]
        if need_weight:
            grad_weight.addmm_(gradient.t(), x.to(dtype))
        if need_bias:
            grad_bias += gradient.sum(0)
    scale = reciprocal((supervised.sum() if normalizer is None else normalizer).to(dtype))
    total = (all_losses if w is None else all_losses * w).sum()
    return total * scale, scale, grad_hidden, grad_weight, grad_bias, all_losses


def _softmax_rows(logits: Tensor, bias: Tensor | None, ids: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The smoothed loss of each row (n,), and its gradient (n, V), which overwrites the logits."""
    native = cpp(logits)
    if native is not None:
        return native.softmax_rows(logits, bias, ids, smoothing), logits
    if bias is not None:
        logits.add_(bias)
    log_p = logits.log_softmax(-1)
    losses = log_p.gather(1, ids[:, None]).squeeze(1) * (smoothing - 1)
    gradient = torch.exp(log_p, out=logits)
    if smoothing:
        losses -= smoothing * log_p.mean(1)
        gradient -= smoothing / logits.shape[1]
    return losses, gradient.scatter_add_(1, ids[:, None], logits.new_full((1, 1), smoothing - 1).expand(len(ids), 1))


# Logits of one chunk on the CPU: 16 MB of float32, which fit in the last-level cache.
_LOGITS_PER_CHUNK = 1 << 22


@cross_entropy_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, target_ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-3:]
    dtype = accumulator(hidden.dtype)
    vocabulary, depth = weight.shape
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((target_ids.shape[0], depth) if need_hidden else 0),
        hidden.new_empty((vocabulary, depth) if need_weight else 0, dtype=dtype),
        hidden.new_empty(vocabulary if need_bias else 0, dtype=dtype),
        hidden.new_empty(target_ids.shape[0], dtype=dtype),
    )


@torch.library.custom_op(f"{NAMESPACE}::scatter_rows", mutates_args=())
@without_autocast
def scatter_rows(source: Tensor, rows: Tensor | None, coefficient: Tensor, count: int) -> Tensor:
    """(count, d) with coefficient * source[i] added into row rows[i]; bitwise reproducible.

    coefficient  0-dim, or (L,): one for each row of the source
    """
    if uses_triton(source):
        from pite_kernels.gpu import cross_entropy as gpu

        with torch.cuda.device_of(source):
            return gpu.scatter_rows(source, rows, coefficient, count)
    # Scaled in the accumulator dtype, because 1 / normalizer is far below float16's smallest normal number.
    factor = coefficient if coefficient.dim() == 0 else coefficient[:, None]
    scaled = (source.to(coefficient.dtype) * factor).to(source.dtype)
    return scaled if rows is None else source.new_zeros(count, source.shape[1]).index_add_(0, rows, scaled)


@scatter_rows.register_fake
def _(source: Tensor, rows: Tensor | None, coefficient: Tensor, count: int) -> Tensor:
    return source.new_empty(source.shape[0] if rows is None else count, source.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, _, rows, _, weights, *_ = inputs
    _, scale, grad_hidden, grad_weight, grad_bias, losses = output
    ctx.mark_non_differentiable(scale, grad_hidden, grad_weight, grad_bias, losses)
    ctx.save_for_backward(rows, scale, grad_hidden, grad_weight, grad_bias, weights)
    ctx.count = hidden.shape[0]
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad_loss, *_unused):  # type: ignore[no-untyped-def]
    rows, scale, dx, dw, db, weights = ctx.saved_tensors
    coefficient = grad_loss * scale
    of_rows = coefficient if weights is None else coefficient * weights.to(coefficient.dtype)
    needs = ctx.needs_input_grad
    grad_hidden = scatter_rows(dx, rows, of_rows, ctx.count) if needs[0] else None
    grad_weight = (dw * coefficient).to(ctx.dtypes[0]) if needs[1] else None
    grad_bias = (db * coefficient).to(ctx.dtypes[1]) if needs[2] else None
    return grad_hidden, grad_weight, grad_bias, *[None] * 9


cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::token_cross_entropy", mutates_args=())
@without_autocast
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    rows: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    need_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (the loss of each target (L,), dX of the rows (L, d), empty if it is not needed)."""
    options = label_smoothing, ignore_index, need_hidden, False, False
    _, _, dx, _, _, losses = cross_entropy_forward(hidden, weight, bias, target_ids, rows, None, None, *options)
    return losses, dx


@token_losses.register_fake
def _(hidden: Tensor, weight: Any, bias: Any, target_ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    count = target_ids.shape[0]
    losses = hidden.new_empty(count, dtype=accumulator(hidden.dtype))
    return losses, hidden.new_empty((count, hidden.shape[1]) if rest[-1] else 0)


def _tokens_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, target_ids, rows, *options, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.count, ctx.options = hidden.shape[0], options
    trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(rows, output[1], *((hidden, weight, bias, target_ids) if trained else ()))


def _tokens_backward(ctx, grad_losses, _grad_dx):  # type: ignore[no-untyped-def]
    rows, dx, *again = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_losses = grad_losses.contiguous()
    grad_hidden = scatter_rows(dx, rows, grad_losses, ctx.count) if needs[0] else None
    grad_weight = grad_bias = None
    if again:
        hidden, weight, bias, target_ids = again
        # Weights are shares of the largest one, since half precision has no 1 / normalizer.
        largest = torch.cat([grad_losses.abs(), grad_losses.new_zeros(1)]).max()
        shares = grad_losses * reciprocal(largest)
        options = *ctx.options, False, *needs[1:3]
        outputs = cross_entropy_forward(hidden, weight, bias, target_ids, rows, largest, shares, *options)
        grad_weight = (outputs[3] * largest).to(weight.dtype) if needs[1] else None
        grad_bias = (outputs[4] * largest).to(bias.dtype) if needs[2] else None
    return grad_hidden, grad_weight, grad_bias, *[None] * 5


token_losses.register_autograd(_tokens_backward, setup_context=_tokens_setup_context)


def validate_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise ValueError with the first supervised id outside the vocabulary."""
    bad = (ids < 0) | (ids >= vocabulary)
    if bool(bad.any()):
        raise ValueError(
            f"linear_cross_entropy: target id {int(ids[bad.nonzero()[0]])} is not in the vocabulary of {vocabulary}"
        )
