"""Low-rank adaptation (LoRA) of frozen linear layers; several layers that share an input are computed in one call.

y_i = x W_i' + scale (x A_i') B_i', with W (all parts stacked) multiplied in one GEMM. The low-rank term is computed
first, and the large GEMM accumulates onto it: its epilogue reads y while the tensor cores are busy. In the other order
a thin GEMM would have to wait while y is read and written again. dX works the same way. Saved for backward are x and
the product x A' (T, parts * r). dW is never computed, because the weight is frozen. docs/kernels.md counts the bytes
and compares with concatenation along K.

The weight may be in float8 (`pite_kernels.fp8`). Float8 GEMMs cannot accumulate, so they come first, and the thin
products are added in x's dtype. All computations with A and B are in x's dtype; a trainer that keeps them in float32
can cast them once for all calls of an optimizer step (`cast`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pite_kernels.dispatch import NAMESPACE, autocast, uses_triton, with_unit_stride, without_autocast
from pite_kernels.fp8 import Fp8Weight, fp8_linear, product


def lora_linear(
    x: Tensor,
    weight: Tensor | Fp8Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *,
    scale: float = 1.0,
    splits: Sequence[int] | None = None,
    bias: Tensor | None = None,
    cast: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Frozen linear layers with LoRA (Hu et al. 2021), fused along their outputs.

    x       (..., d_in)             under `torch.autocast` it is cast to that dtype
    weight  (sum(splits), d_in)     frozen: q, k, v stacked, or gate, up stacked, or one layer; float8 if it comes from
                                    `quantize_weight`
    lora_a  (len(splits) * r, d_in) the A of all parts, stacked; None (with lora_b None) for a plain linear layer
    lora_b  (sum(splits), r)        the B of all parts, stacked
    scale   alpha / r
    splits  number of outputs of each part; None: one part
    bias    (sum(splits),)          frozen: the biases of all parts, as in Qwen's q, k, v; or None
    cast    A and B rounded to x's dtype, which saves casting them in each call; the gradients are those of lora_a and
            lora_b. Without it, or with another dtype than x's, each call casts
    Returns (..., sum(splits)): part i is x W_i' + b_i + scale (x A_i') B_i', in x's dtype. A and B may be float32 with a
    half-precision x; so may weight and bias, but they are then cast in each call. Raises ValueError on shapes that do not
    fit, on a weight or bias with requires_grad, and on a float8 weight with an x that is not bfloat16 on CUDA.
    """
    if lora_a is None or lora_b is None:
        if lora_a is not lora_b:
            raise ValueError("lora_linear: give both lora_a and lora_b, or neither")
        if isinstance(weight, Fp8Weight):
            return fp8_linear(autocast(x), weight, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    x = autocast(x)
    frozen = list(weight) if isinstance(weight, Fp8Weight) else [weight]
    sizes = [frozen[0].shape[0]] if splits is None else list(splits)
    _check(x, frozen, lora_a, lora_b, sizes, bias, cast)
    ready = list(cast) if cast is not None and cast[0].dtype == x.dtype else []
    arguments = (x.reshape(-1, x.shape[-1]), frozen, lora_a, lora_b, scale, sizes, bias, ready)
    # Only torch.compile gets the torch.library operator: it adds 0.18 ms of host time per call and backward, as much as
    # everything else in this function.
    if torch.compiler.is_compiling():
        y, _ = lora_forward(*arguments)
    elif not torch.is_grad_enabled():
        y, _ = _forward(*arguments)
    else:
        y = _LoRALinear.apply(*arguments)
    return y.view(*x.shape[:-1], sum(sizes))


def _check(
    x: Tensor,
    frozen: list[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    splits: list[int],
    bias: Tensor | None,
    cast: tuple[Tensor, Tensor] | None,
) -> None:
    rank, d_in = lora_b.shape[-1], x.shape[-1]
    expected = [(sum(splits), d_in), (len(splits) * rank, d_in), (sum(splits), rank)]
    if [tuple(frozen[0].shape), tuple(lora_a.shape), tuple(lora_b.shape)] != expected:
        raise ValueError(
            f"lora_linear: weight {tuple(frozen[0].shape)}, lora_a {tuple(lora_a.shape)} and "
            f"lora_b {tuple(lora_b.shape)} do not fit x {tuple(x.shape)} and splits {splits}"
        )
    if bias is not None and bias.shape != (sum(splits),):
        raise ValueError(f"lora_linear: bias must be ({sum(splits)},), not {tuple(bias.shape)}")
    if cast is not None and [(t.shape, t.dtype) for t in cast] != [(t.shape, cast[0].dtype) for t in (lora_a, lora_b)]:
        raise ValueError("lora_linear: cast must be lora_a and lora_b in x's dtype, in their shapes")
    if frozen[0].requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "lora_linear: weight and bias must be frozen (requires_grad False); their gradients are never computed"
        )
    if len(frozen) > 1 and x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f"lora_linear: float8 weights need bfloat16 activations on CUDA, not {x.dtype}")


@without_autocast
def _forward(
    x: Tensor,
    weight: list[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    splits: list[int],
    bias: Tensor | None,
    cast: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns (y (T, d_out), x A' (T, parts * r)).

    weight  one tensor, or the four tensors of an Fp8Weight;  cast  A and B in x's dtype, or empty
    """
    a, b = cast or (lora_a.to(x.dtype), lora_b.to(x.dtype))
    low = torch.mm(x, a.t())
    fp8 = Fp8Weight(*weight) if len(weight) > 1 else None
    y = x.new_empty(x.shape[0], weight[0].shape[0]) if fp8 is None else product(x, fp8.rows, fp8.row_scales)
    bias = None if bias is None else bias.to(x.dtype)
    if bias is not None and fp8 is not None:
        y += bias
    several = len(splits) > 1
    parts = zip(y.split(splits, 1), low.split(b.shape[1], 1), b.split(splits)) if several else ((y, low, b),)
    biases = bias.split(splits) if bias is not None and fp8 is None else [None] * len(splits)
    for (part, low_i, b_i), bias_i in zip(parts, biases):
        if bias_i is None:
            part.addmm_(low_i, b_i.t(), beta=0 if fp8 is None else 1, alpha=scale)
        else:
            torch.addmm(bias_i, low_i, b_i.t(), alpha=scale, out=part)
    return y if fp8 is not None else y.addmm_(x, weight[0].to(x.dtype).t()), low


lora_forward = torch.library.custom_op(f"{NAMESPACE}::lora_linear", _forward, mutates_args=())


@lora_forward.register_fake
def _(x: Tensor, weight: list[Tensor], lora_a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight[0].shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@without_autocast
def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: list[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    low: Tensor,
    scale: float,
    splits: list[int],
    cast: list[Tensor],
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dA, dB); a gradient that is not needed is an empty tensor."""
    a, b = cast or (lora_a.to(x.dtype), lora_b.to(x.dtype))
    grad_x, grad_a, grad_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    grad_low = x.new_empty(0)
    if need_b and (need_x or need_a) and _one_pass(x, b):
        from pite_kernels.gpu import lora as gpu

        with torch.cuda.device_of(x):
            grad_low, grad_b = gpu.thin_products(with_unit_stride(grad), b, low, scale, splits)
        grad_b = grad_b.to(lora_b.dtype)
    else:
        parts = grad.split(splits, 1)
        if need_x or need_a:
            grad_low = torch.cat([torch.mm(g, b_i) for g, b_i in zip(parts, b.split(splits))], 1).mul_(scale)
        if need_b:
            columns = (low * scale).split(b.shape[1], 1)
            grad_b = torch.cat([torch.mm(g.t(), low_i) for g, low_i in zip(parts, columns)]).to(lora_b.dtype)
    if need_x and len(weight) > 1:
        fp8 = Fp8Weight(*weight)
        grad_x = product(grad, fp8.columns, fp8.column_scales).addmm_(grad_low, a)
    elif need_x:
        grad_x = torch.mm(grad_low, a).addmm_(grad, weight[0].to(x.dtype))
    if need_a:
        grad_a = torch.mm(grad_low.t(), x).to(lora_a.dtype)
    return grad_x, grad_a, grad_b


def _one_pass(x: Tensor, lora_b: Tensor) -> bool:
    """Whether one Triton kernel computes both products with dY: in half precision, with a rank that fits a tile."""
    return uses_triton(x) and x.dtype != torch.float32 and lora_b.shape[1] <= 128


lora_backward = torch.library.custom_op(f"{NAMESPACE}::lora_linear_backward", _gradients, mutates_args=())


@lora_backward.register_fake
def _(grad: Any, x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_a, grad_b = (t.new_empty(t.shape if need else 0) for t, need in zip((x, lora_a, lora_b), rest[-3:]))
    return grad_x, grad_a, grad_b


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, lora_a, lora_b, ctx.scale, ctx.splits, _, cast = inputs
    _, low = output
    ctx.mark_non_differentiable(low)
    ctx.set_materialize_grads(False)  # no tensor of zeros for the gradient of `low`
    ctx.save_for_backward(x, lora_a, lora_b, low, *cast, *weight)
    ctx.casts = len(cast)


def _backward(ctx, grad, _grad_low):  # type: ignore[no-untyped-def]
    grad_x, grad_a, grad_b = _saved_gradients(ctx, grad, lora_backward)
    casts, weights = [None] * ctx.casts, [None] * (len(ctx.saved_tensors) - 4 - ctx.casts)
    return grad_x, weights, grad_a, grad_b, None, None, None, casts


def _saved_gradients(ctx: Any, grad: Tensor, gradients: Callable[..., Any]) -> list[Tensor | None]:
    """dX, dA and dB from what forward saved; None where a gradient is not needed."""
    x, lora_a, lora_b, low, *rest = ctx.saved_tensors
    cast, weight = rest[: ctx.casts], rest[ctx.casts :]
    needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4]
    grads = gradients(grad, x, weight, lora_a, lora_b, low, ctx.scale, ctx.splits, cast, *needs)
    return [g if need else None for g, need in zip(grads, needs)]


lora_forward.register_autograd(_backward, setup_context=_setup_context)


class _LoRALinear(torch.autograd.Function):
    """Calls the bodies of the two operators directly; a profiler's trace shows this name."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, low = _forward(*inputs)
        x, weight, lora_a, lora_b, ctx.scale, ctx.splits, _, cast = inputs
        ctx.save_for_backward(x, lora_a, lora_b, low, *cast, *weight)
        ctx.casts = len(cast)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_a, grad_b = _saved_gradients(ctx, grad, _gradients)
        return grad_x, None, grad_a, grad_b, *[None] * 4
