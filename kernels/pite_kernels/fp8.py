"""Frozen weights in float8 (e4m3): both factors of a product are quantized by row, with one scale per row.

A weight is quantized once, in both orientations, because a float8 GEMM contracts the last dimension of both factors:
x W' over the inputs and dY W over the outputs. x and dY are quantized at each call. The two orientations together take
as many bytes as the bfloat16 weight that they replace. With a scale per row the range of float8 is sufficient; its
precision is the limit: three bits of mantissa, a relative error of at most 1/16 per number and a root-mean-square error
of about 2.6%. A product averages over these errors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pite_kernels.dispatch import uses_triton, with_unit_stride

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


def dequantize(quantized: Tensor, scales: Tensor) -> Tensor:
    """The float32 values of a quantized matrix."""
    return quantized.float() * scales[:, None]


def why_unsupported(device: torch.device) -> str | None:
    """The reason why a device cannot multiply float8; None if it can, and for a CPU, which emulates it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    return f"{torch.cuda.get_device_name(device)} has no float8 arithmetic, which came with sm_89 (H100, H200, L40S)"
