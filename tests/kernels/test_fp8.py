"""Frozen weights in float8: quantization, products, and LoRA layers with a float8 weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pite_kernels import Fp8Weight, lora_linear, quantize_weight
from pite_kernels.fp8 import FP8, LARGEST, dequantize, product, quantize_rows, why_unsupported
from pite_kernels.lora import lora_backward, lora_forward
from tests.kernels.helpers import assert_bitwise

HALF_STEP = 1 / 16
"""The largest relative rounding error of a number with three bits of mantissa."""


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_the_error_of_every_number_is_at_most_half_a_step(dtype, scale):
    x = (normal(40, 64) * scale).to(dtype)
    quantized, scales = quantize_rows(x)
    assert quantized.dtype == FP8 and scales.dtype == torch.float32 and scales.shape == (40,)
    assert quantized.float().abs().amax(1).eq(LARGEST).all(), "the largest value of each row becomes the largest float8"
    # Normal float8 numbers start at 2^-6. Below, all steps have the same size: 2^-9.
    bound = torch.maximum(HALF_STEP * x.float().abs(), 2**-10 * scales[:, None])
    assert ((dequantize(quantized, scales) - x.float()).abs() <= bound * (1 + 1e-6)).all()


def test_rows_of_zeros_empty_rows_and_rows_that_are_not_finite():
    x = torch.zeros(4, 16)
    x[1] = 1e-38
    x[2, 3], x[3, 5] = torch.inf, torch.nan
    values = dequantize(*quantize_rows(x))
    assert values[0].eq(0).all() and values[1].isfinite().all()
    assert values[2:].isnan().any(1).all(), "a number that is not finite makes the row NaN"
    assert [t.shape for t in quantize_rows(x[:0])] == [(0, 16), (0,)]
    strided = normal(16, 8).t()
    assert_bitwise(quantize_rows(strided)[:1], quantize_rows(strided.contiguous())[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_emulation_equals_scaled_mm(dtype):
    x, weight = normal(33, 64, dtype=dtype), quantize_weight(normal(48, 64, seed=1, dtype=dtype))
    quantized, scales = quantize_rows(x)
    row_wise = F.ScalingType.RowWise
    factors = (quantized, weight.rows.t(), scales[:, None], row_wise, weight.row_scales[None], row_wise)
    try:
        expected = F.scaled_mm(*factors, output_dtype=dtype)
    except NotImplementedError:
        pytest.skip("this torch has no float8 product on the CPU; 2.13 has")
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    torch.testing.assert_close(product(x, weight.rows, weight.row_scales), expected, **tolerance)


def test_the_error_of_a_product_is_within_the_bound_of_its_factors():
    x, w = normal(64, 256), normal(96, 256, seed=1)
    weight = quantize_weight(w)
    grad = normal(64, 96, seed=2)
    for ours, a, b in (
        (product(x, weight.rows, weight.row_scales), x, w.t()),
        (product(grad, weight.columns, weight.column_scales), grad, w),
    ):
        exact = a.double() @ b.double()
        # Each factor is off by at most 1/16: (1 + 1/16)^2 - 1, plus a little for subnormal numbers.
        assert ((ours - exact).abs() <= 0.13 * (a.double().abs() @ b.double().abs())).all()
        error = (ours - exact).norm() / exact.norm()
        assert 0.02 < error < 0.045, "two roundings of 2.6% root mean square each, independent of the length of the sum"


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
def test_a_lora_layer_is_the_sum_of_its_float8_and_thin_products(dtype, splits):
    x, weight, a, b = layer(splits, dtype=dtype)
    ours = results(x, weight, a, b, splits)
    upstream = normal(*ours[0].shape, seed=4).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    nothing = torch.zeros(weight.rows.shape, dtype=torch.float64)
    # A layer whose weight is zero computes only the thin products.
    y = lora_linear(wide[0], nothing, *wide[1:], scale=2.0, splits=splits)
    thin = [y.detach(), *torch.autograd.grad(y, wide, upstream.double())]
    thin[0] += product(x.detach(), weight.rows, weight.row_scales).double()
    thin[1] += product(upstream, weight.columns, weight.column_scales).double()
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    for got, expected in zip(ours, thin):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_are_close_to_those_of_the_exact_weight():
    """y and dX differ by the quantization error. dA and dB do not depend on the weight and are equal."""
    x, weight, a, b = layer()
    w = normal(48, 64, seed=1) * 64**-0.5
    exact = results(x, w, a, b)
    ours = results(x, weight, a, b)
    for got, expected in zip(ours[:2], exact[:2]):
        assert (got - expected).norm() / expected.norm() < 0.03
    assert_bitwise(ours[2:], exact[2:])


def test_compiled_and_repeated_calls_are_equal_and_opcheck():
    x, weight, a, b = layer()
    first = results(x, weight, a, b)
    assert_bitwise(first, results(x, weight, a, b))
    assert_bitwise(
        first, results(x, weight, a, b, function=torch.compile(lora_linear, fullgraph=True, backend="aot_eager"))
    )
    # Without opcheck's schema test, which compares inputs: torch cannot compare float8. test_lora.py runs that test.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(lora_forward, (x, list(weight), a, b, 2.0, [32, 16], None, []), test_utils=checks)
    x, a, b = (t.detach() for t in (x, a, b))
    y, low = lora_forward(x, list(weight), a, b, 2.0, [32, 16], None, [])
    arguments = (torch.randn_like(y), x, list(weight), a, b, low, 2.0, [32, 16], [], True, True, True)
    torch.library.opcheck(lora_backward, arguments, test_utils=checks)
    empty = results(x[:0].requires_grad_(), weight, a.requires_grad_(), b.requires_grad_())
    assert empty[0].shape == (0, 48) and empty[2].eq(0).all()


def test_invalid_arguments_raise():
    x, weight, a, b = layer()
    with pytest.raises(ValueError, match=r"divisible by 16, but a weight has shape \(40, 64\)"):
        quantize_weight(torch.zeros(40, 64))
    with pytest.raises(ValueError, match=r"a weight \(48, 64\) does not fit x \(\d+, 32\)"):
        lora_linear(x[:, :32], weight, None, None)
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, Fp8Weight(*weight), a, b, splits=[16, 16])


def test_devices_without_float8(monkeypatch):
    assert why_unsupported(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, supported in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (why_unsupported(torch.device("cuda")) is None) == supported
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "NVIDIA A100 has no float8" in (why_unsupported(torch.device("cuda")) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_a_lora_equals_one_whose_lora_is_zero(dtype):
    x, weight = normal(3, 10, 64, dtype=dtype).requires_grad_(), quantize_weight(normal(48, 64, seed=1, dtype=dtype))
    a, b, bias, grad = (
        normal(4, 64),
        torch.zeros(48, 4),
        normal(48, dtype=dtype),
        normal(3, 10, 48, seed=2, dtype=dtype),
    )
    found = []
    for arguments in ((None, None), (a, b)):
        y = lora_linear(x, weight, *arguments, bias=bias)
        found.append((y, *torch.autograd.grad(y, x, grad)))
    assert_bitwise(*found)
    compiled = torch.compile(lambda x: lora_linear(x, weight, None, None), fullgraph=True, backend="aot_eager")(x)
    assert_bitwise((compiled,), (lora_linear(x, weight, None, None),))
