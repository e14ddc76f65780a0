"""LoRA layers: equal to the plain form for one, two and three parts, without a gradient of the frozen weight."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pite_kernels import lora_linear, quantize_weight, reference
from pite_kernels.lora import lora_backward, lora_forward
from tests.kernels.helpers import assert_as_accurate, assert_bitwise, run

SPLITS = [None, [24, 24], [32, 8, 8]]


def make(dtype=torch.float32, splits=None, lead=(3, 7), d_in=40, rank=4, lora_dtype=None):
    g = torch.Generator().manual_seed(1)
    parts = 1 if splits is None else len(splits)
    d_out = 48

    def normal(*shape):
        return torch.randn(*shape, generator=g) * shape[-1] ** -0.5

    x = torch.randn(*lead, d_in, generator=g).to(dtype).requires_grad_()
    a, b = (t.to(lora_dtype or dtype).requires_grad_() for t in (normal(parts * rank, d_in), normal(d_out, rank)))
    return x, normal(d_out, d_in).to(dtype), a, b


def results(x, weight, a, b, splits, function=lora_linear):
    y = function(x, weight, a, b, scale=2.0, splits=splits)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), upstream)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("lead", [(3, 7), (64,), (0,)])
def test_against_float64(dtype, splits, lead):
    x, weight, a, b = make(dtype, splits, lead)
    exact = [t.detach().double() for t in (x, weight, a, b)]
    for t in (exact[0], *exact[2:]):
        t.requires_grad_()
    plain = results(x, weight, a, b, splits, reference.lora_linear)
    assert_as_accurate(results(x, weight, a, b, splits), plain, results(*exact, splits, reference.lora_linear))


def test_any_strides():
    x, weight, a, b = make(splits=[24, 24], lead=(40,))
    turned = x.detach().t().requires_grad_()
    strided = weight.t().contiguous().t()
    expected = results(turned, weight, a, b, [24, 24], reference.lora_linear)
    for ours, plain in zip(results(turned, strided, a, b, [24, 24]), expected):
        torch.testing.assert_close(ours, plain)


def test_float32_adapters_on_bfloat16_layers():
    x, weight, a, b = make(torch.bfloat16, [24, 24], lora_dtype=torch.float32)
    y, grad_x, grad_a, grad_b = results(x, weight, a, b, [24, 24])
    assert [t.dtype for t in (grad_x, grad_a, grad_b, y)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]


def test_without_adapters_it_equals_linear():
    x, weight, a, _ = make()
    assert torch.equal(lora_linear(x, weight, None, None), torch.nn.functional.linear(x, weight))
    with pytest.raises(ValueError, match="both"):
        lora_linear(x, weight, a, None)


def test_only_trainable_inputs_get_a_gradient():
    x, weight, a, b = make()
    y = lora_linear(x.detach(), weight, a, b.detach(), scale=2.0)
    y.sum().backward()
    assert x.grad is None and b.grad is None and weight.grad is None
    assert a.grad is not None


def test_invalid_arguments_raise():
    x, weight, a, b = make()
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(x, weight.requires_grad_(), a, b)
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, weight.detach(), a, b, splits=[24, 24])
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x[..., :39], weight.detach(), a, b)


def test_repeated_and_compiled_calls_are_equal_and_gradients_accumulate():
    x, weight, a, b = make(splits=SPLITS[2])
    first = results(x, weight, a, b, SPLITS[2])
    assert_bitwise(first, results(x, weight, a, b, SPLITS[2]))
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    assert_bitwise(first, results(x, weight, a, b, SPLITS[2], compiled))
    once = run(lambda: lora_linear(x, weight, a, b, splits=SPLITS[2]).sum(), (x, a, b), 1.0)[1:]
    y = lora_linear(x, weight, a, b, splits=SPLITS[2]).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert_bitwise([t.grad for t in (x, a, b)], [2 * g for g in once])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", SPLITS)
def test_bias(dtype, splits):
    x, weight, a, b = make(dtype, splits)
    bias = torch.linspace(-2, 3, 48).to(dtype)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, a, b)]
    ours, plain = (
        results(x, weight, a, b, splits, partial(function, bias=bias))
        for function in (lora_linear, reference.lora_linear)
    )
    truth = results(*exact, splits, partial(reference.lora_linear, bias=bias.double()))
    assert_as_accurate(ours, plain, truth)
    assert not torch.allclose(ours[0], results(x, weight, a, b, splits)[0])
    assert torch.equal(lora_linear(x, weight, None, None, bias=bias), torch.nn.functional.linear(x, weight, bias))


def test_bias_of_a_float8_weight():
    x, weight, a, b = make(torch.float32, [24, 24], d_in=48)
    bias, frozen = torch.linspace(-2, 3, 48), quantize_weight(weight)
    without, with_bias = (lora_linear(x, frozen, a, b, splits=[24, 24], bias=bias) for bias in (None, bias))
    torch.testing.assert_close(with_bias, without + bias)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("splits", SPLITS)
def test_adapters_that_are_cast_already(splits, compiled):
    """The same bits as casting in the call; a cast in another dtype than x's is not used."""
    x, weight, a, b = make(torch.bfloat16, splits, lora_dtype=torch.float32)
    expected = results(x, weight, a, b, splits)
    function = partial(lora_linear, cast=(a.detach().bfloat16(), b.detach().bfloat16()))
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = results(x, weight, a, b, splits, function)
    assert_bitwise(found, expected)
    assert [t.dtype for t in found[2:]] == [torch.float32] * 2
    stale = partial(lora_linear, cast=(a.detach() * 0, b.detach() * 0))
    assert_bitwise(results(x, weight, a, b, splits, stale), expected)
    used = partial(lora_linear, cast=(a.detach().bfloat16() * 0, b.detach().bfloat16()))
    assert not torch.equal(results(x, weight, a, b, splits, used)[0], expected[0])


def test_invalid_bias_and_cast_raise():
    x, weight, a, b = make(splits=[24, 24])
    with pytest.raises(ValueError, match="bias must be"):
        lora_linear(x, weight, a, b, splits=[24, 24], bias=torch.zeros(24))
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(x, weight, a, b, splits=[24, 24], bias=torch.zeros(48, requires_grad=True))
    with pytest.raises(ValueError, match="in their shapes"):
        lora_linear(x, weight, a, b, splits=[24, 24], cast=(b, a))
    with pytest.raises(ValueError, match="in x's dtype"):
        lora_linear(x, weight, a, b, splits=[24, 24], cast=(a.detach(), b.detach().bfloat16()))


def test_without_lora_weight_and_bias_are_cast_as_with_it():
    x, weight, *_ = make(torch.bfloat16)
    weight, bias = weight.float(), torch.linspace(-1, 1, len(weight))
    expected = torch.nn.functional.linear(x, weight.bfloat16(), bias.bfloat16())
    assert torch.equal(lora_linear(x, weight, None, None, bias=bias), expected)


@pytest.mark.parametrize("cast", [False, True])
def test_opcheck(cast):
    x, weight, a, b = make(splits=[24, 24], lead=(9,))
    ready = [a.detach().clone(), b.detach().clone()] if cast else []
    torch.library.opcheck(lora_forward, (x, [weight], a, b, 2.0, [24, 24], torch.ones(48), ready))
    x, a, b = (t.detach() for t in (x, a, b))
    y, low = lora_forward(x, [weight], a, b, 2.0, [24, 24], None, ready)
    arguments = (torch.randn_like(y), x, [weight], a, b, low, 2.0, [24, 24], ready, True, True, True)
    torch.library.opcheck(lora_backward, arguments)
