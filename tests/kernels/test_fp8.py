"""Frozen weights in float8: the quantisation itself, products of it, and LoRA layers on top."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pite_kernels import Fp8Weight, lora_linear, quantize_weight
from pite_kernels.fp8 import FP8, LARGEST, dequantize, product, quantize_rows, why_unsupported
from pite_kernels.lora import lora_backward, lora_forward
from tests.kernels.helpers import assert_bitwise

HALF_STEP = 1 / 16
"""The largest relative rounding error of a number with three bits of mantissa behind the point."""


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_every_number_is_within_half_a_step(dtype, scale):
    x = (normal(40, 64) * scale).to(dtype)
    quantized, scales = quantize_rows(x)
    assert quantized.dtype == FP8 and scales.dtype == torch.float32 and scales.shape == (40,)
    assert quantized.float().abs().amax(1).eq(LARGEST).all(), "the largest of each row is the largest float8"
    # Below the normal float8 numbers, which start at 2^-6, steps are of equal size: 2^-9.
    bound = torch.maximum(HALF_STEP * x.float().abs(), 2**-10 * scales[:, None])
    assert ((dequantize(quantized, scales) - x.float()).abs() <= bound * (1 + 1e-6)).all()


def test_rows_of_zeros_of_nothing_and_of_anything():
    x = torch.zeros(4, 16)
    x[1] = 1e-38
    x[2, 3], x[3, 5] = torch.inf, torch.nan
    values = dequantize(*quantize_rows(x))
    assert values[0].eq(0).all() and values[1].isfinite().all()
    assert values[2:].isnan().any(1).all(), "what is not finite stays so, and is seen"
    assert [t.shape for t in quantize_rows(x[:0])] == [(0, 16), (0,)]
    strided = normal(16, 8).t()
    assert_bitwise(quantize_rows(strided)[:1], quantize_rows(strided.contiguous())[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_emulation_is_what_pytorch_multiplies(dtype):
    x, weight = normal(33, 64, dtype=dtype), quantize_weight(normal(48, 64, seed=1, dtype=dtype))
    quantized, scales = quantize_rows(x)
    row_wise = F.ScalingType.RowWise
    factors = (quantized, weight.rows.t(), scales[:, None], row_wise, weight.row_scales[None], row_wise)
    try:
        expected = F.scaled_mm(*factors, output_dtype=dtype)
    except NotImplementedError:
        pytest.skip("this torch has no float8 product on the CPU, as 2.13 does")
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    torch.testing.assert_close(product(x, weight.rows, weight.row_scales), expected, **tolerance)


def test_a_product_is_within_the_bound_of_its_factors():
    x, w = normal(64, 256), normal(96, 256, seed=1)
    weight = quantize_weight(w)
    grad = normal(64, 96, seed=2)
    for ours, a, b in (
        (product(x, weight.rows, weight.row_scales), x, w.t()),
        (product(grad, weight.columns, weight.column_scales), grad, w),
    ):
        exact = a.double() @ b.double()
        # Each factor is off by 1/16 at most: (1 + 1/16)^2 - 1, and a little for numbers below the normal ones.
        assert ((ours - exact).abs() <= 0.13 * (a.double().abs() @ b.double().abs())).all()
        error = (ours - exact).norm() / exact.norm()
        assert 0.02 < error < 0.045, "two roundings of 2.6% in the mean square, whatever the length of the sum"


def layer(splits=(32, 16), tokens=21, d_in=64, rank=4, dtype=torch.float32):
    x = normal(tokens, d_in, dtype=dtype).requires_grad_()
    w = normal(sum(splits), d_in, seed=1, dtype=dtype) * d_in**-0.5
    a = (normal(len(splits) * rank, d_in, seed=2) * d_in**-0.5).requires_grad_()
    b = normal(sum(splits), rank, seed=3).requires_grad_()
    return x, quantize_weight(w), a, b


def results(x, weight, a, b, splits=(32, 16), function=lora_linear):
    y = function(x, weight, a, b, scale=2.0, splits=splits)
    upstream = normal(*y.shape, seed=4).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [(48,), (32, 16), (16, 16, 16)])
def test_a_lora_layer_is_its_two_products_and_the_thin_ones(dtype, splits):
    x, weight, a, b = layer(splits, dtype=dtype)
    ours = results(x, weight, a, b, splits)
    upstream = normal(*ours[0].shape, seed=4).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    nothing = torch.zeros(weight.rows.shape, dtype=torch.float64)
    # The thin products are those of a layer whose weight is zero.
    y = lora_linear(wide[0], nothing, *wide[1:], scale=2.0, splits=splits)
    thin = [y.detach(), *torch.autograd.grad(y, wide, upstream.double())]
    thin[0] += product(x.detach(), weight.rows, weight.row_scales).double()
    thin[1] += product(upstream, weight.columns, weight.column_scales).double()
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    for got, expected in zip(ours, thin):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_follow_bfloat16s():
    """To the quantised and to the exact weight; the gradients of A and B differ by nothing but what reaches them."""
    x, weight, a, b = layer()
    w = normal(48, 64, seed=1) * 64**-0.5
    exact = results(x, w, a, b)
    ours = results(x, weight, a, b)
    for got, expected in zip(ours[:2], exact[:2]):
        assert (got - expected).norm() / expected.norm() < 0.03
    assert_bitwise(ours[2:], exact[2:])


def test_compiles_repeats_and_knows_its_shapes():
    x, weight, a, b = layer()
    first = results(x, weight, a, b)
    assert_bitwise(first, results(x, weight, a, b))
    assert_bitwise(
        first, results(x, weight, a, b, function=torch.compile(lora_linear, fullgraph=True, backend="aot_eager"))
    )
    # Its schema check compares inputs before and after, and torch cannot compare float8; test_lora.py runs it.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(lora_forward, (x, list(weight), a, b, 2.0, [32, 16]), test_utils=checks)
    x, a, b = (t.detach() for t in (x, a, b))
    y, low = lora_forward(x, list(weight), a, b, 2.0, [32, 16])
    arguments = (torch.randn_like(y), x, list(weight), a, b, low, 2.0, [32, 16], True, True, True)
    torch.library.opcheck(lora_backward, arguments, test_utils=checks)
    empty = results(x[:0].requires_grad_(), weight, a.requires_grad_(), b.requires_grad_())
    assert empty[0].shape == (0, 48) and empty[2].eq(0).all()


def test_refusals():
    x, weight, a, b = layer()
    with pytest.raises(ValueError, match=r"divisible by 16, and a weight is \(40, 64\)"):
        quantize_weight(torch.zeros(40, 64))
    with pytest.raises(ValueError, match="give lora_a and lora_b with it"):
        lora_linear(x, weight, None, None)
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, Fp8Weight(*weight), a, b, splits=[16, 16])


def test_devices_without_float8(monkeypatch):
    assert why_unsupported(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, served in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (why_unsupported(torch.device("cuda")) is None) == served
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "NVIDIA A100 has no float8" in (why_unsupported(torch.device("cuda")) or "")
