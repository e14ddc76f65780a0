"""Frozen weights in float8 (e4m3): both factors of a product are quantized by row, with one scale per row.

A weight is quantized once, in both orientations, because a float8 GEMM contracts the last dimension of both factors:
x W' over the inputs and dY W over the outputs. x and dY are quantized at each call. The two orientations together take
as many bytes as the bfloat16 weight that they replace. With a scale per row the range of float8 is sufficient; its
precision is the limit: three bits of mantissa, a relative error of at most 1/16 per number and a root-mean-square error
of about 2.6%. A product averages over these errors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pite_kernels.dispatch import NAMESPACE, uses_triton, with_unit_stride

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST_ROW = 1e-30
"""Lower bound of a row's largest number when its scale is computed, so that a row of zeros stays zero."""


class Fp8Weight(NamedTuple):
    """A frozen weight (d_out, d_in) in float8, made by `quantize_weight`.

    rows     (d_out, d_in) and row_scales (d_out,) float32: the weight is about rows * row_scales[:, None]
    columns  (d_in, d_out) and column_scales (d_in,) float32: its transpose is about columns * column_scales[:, None]
    """

    rows: Tensor
    row_scales: Tensor
    columns: Tensor
    column_scales: Tensor


def quantize_weight(weight: Tensor) -> Fp8Weight:
    """Both float8 orientations of a weight (d_out, d_in).

    Raises ValueError for sizes and devices without float8 GEMMs.
    """
    why = why_unsupported(weight.device)
    if why is not None:
        raise ValueError(why)
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(f"float8 products need sizes divisible by 16, but a weight has shape {tuple(weight.shape)}")
    (rows, row_scales), (columns, column_scales) = quantize_rows(weight), quantize_rows(weight.t().contiguous())
    return Fp8Weight(rows, row_scales, columns, column_scales)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) as float8 (n, k) and float32 scales (n,): x is about float8 * scales[:, None].

    The largest absolute value of a row becomes the largest float8. A row with a NaN or an infinity becomes NaN.
    """
    x = with_unit_stride(x)
    if uses_triton(x):
        from pite_kernels.gpu import fp8 as gpu

        with torch.cuda.device_of(x):
            return gpu.quantize_rows(x, FP8, SMALLEST_ROW)
    largest = x.abs().amax(1, keepdim=True).float().clamp_min(SMALLEST_ROW)
    return (x.float() * (LARGEST / largest)).to(FP8), (largest / LARGEST)[:, 0]


def product(x: Tensor, matrix: Tensor, scales: Tensor) -> Tensor:
    """x (n, k), quantized by row here, times the transpose of a quantized matrix (m, k): (n, m) in x's dtype.

    Uses tensor cores on CUDA (sm_89 and newer). Elsewhere the same float8 numbers are multiplied in float32: the result
    equals that of the tensor cores up to the order of sums.
    """
    quantized, own_scales = quantize_rows(x)
    if x.is_cuda:
        row_wise = F.ScalingType.RowWise
        # Fast accumulation: exact sums cost a third of the tensor cores' speed, and the factors are only exact to 1/16.
        return F.scaled_mm(
            quantized, matrix.t(), own_scales[:, None], row_wise, scales[None], row_wise,
            output_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
    return torch.mm(dequantize(quantized, own_scales), dequantize(matrix, scales).t()).to(x.dtype)


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """A frozen linear layer with a float8 weight: x (..., d_in) -> (..., d_out), in x's dtype; its dX is in float8 too.

    Nothing is saved for the backward pass but the weight. Raises ValueError on CUDA for an x that is not bfloat16, and for
    shapes that do not fit.
    """
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f"float8 weights need bfloat16 activations on CUDA, not {x.dtype}")
    if x.shape[-1] != weight.rows.shape[1]:
        raise ValueError(f"a weight {tuple(weight.rows.shape)} does not fit x {tuple(x.shape)}")
    y = fp8_forward(x.reshape(-1, x.shape[-1]), *weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


@torch.library.custom_op(f"{NAMESPACE}::fp8_linear", mutates_args=())
def fp8_forward(x: Tensor, rows: Tensor, row_scales: Tensor, columns: Tensor, column_scales: Tensor) -> Tensor:
    return product(x, rows, row_scales)


@fp8_forward.register_fake
def _(x: Tensor, rows: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[0])


def _keep_weight(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _fp8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, row_scales, columns, column_scales = ctx.saved_tensors
    # The transposed weight takes the other's place.
    grad_x = fp8_forward(grad, columns, column_scales, rows, row_scales) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, None, None


fp8_forward.register_autograd(_fp8_backward, setup_context=_keep_weight)


def dequantize(quantized: Tensor, scales: Tensor) -> Tensor:
    """The float32 values of a quantized matrix."""
    return quantized.float() * scales[:, None]


def why_unsupported(device: torch.device) -> str | None:
    """The reason why a device cannot multiply float8; None if it can, and for a CPU, which emulates it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    return f"{torch.cuda.get_device_name(device)} has no float8 arithmetic, which came with sm_89 (H100, H200, L40S)"
