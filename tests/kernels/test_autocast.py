"""Under torch.autocast, as in Hugging Face's Trainer: at most twice the error of plain PyTorch under the same autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pite_kernels import linear_cross_entropy, lora_linear, reference, trajectory_l1, two_head_loss
from tests.kernels.helpers import Heads, assert_as_accurate, assert_bitwise, make_heads, run
from tests.kernels.test_lora import make, results

HALF = [torch.bfloat16, torch.float16]


def trajectory(h: Heads, function=trajectory_l1):
    return function(h.hidden, h.weight, h.bias, h.targets, h.rows), (h.hidden, h.weight, h.bias)


def cross_entropy(h: Heads, function=linear_cross_entropy):
    value = function(h.hidden, h.lm_weight, h.target_ids, h.target_rows, label_smoothing=0.1)
    return value, (h.hidden, h.lm_weight)


def both(h: Heads, function=two_head_loss):
    inputs = (h.hidden, h.lm_weight, h.target_ids, h.target_rows, h.weight, h.bias, h.targets, h.rows)
    value, _, _ = function(*inputs, label_smoothing=0.1, weight=2.0, normalizers=(None, None))
    return value, h.trainable


LOSSES = {"trajectory_l1": trajectory, "linear_cross_entropy": cross_entropy, "two_head_loss": both}


def gradients(loss, heads: Heads, dtype: torch.dtype | None, inside: bool, *function) -> list[torch.Tensor]:
    """The loss and its gradients; `inside`: the backward pass too is under autocast."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        value, inputs = loss(heads, *function)
        if inside:
            return [value.detach(), *torch.autograd.grad(value, inputs)]
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, None])
def test_losses(name, dtype, inside, hidden_dtype, cpu_path):
    """Hidden states in float32, from a norm, and in autocast's dtype, from a linear layer; the heads are float32."""
    heads = make_heads()
    if hidden_dtype is None:
        heads = replace(heads, hidden=heads.hidden.detach().to(dtype).requires_grad_())
    plain_function, exact = getattr(reference, name), heads.to(torch.float64)
    ours = gradients(LOSSES[name], heads, dtype, inside)
    assert [g.dtype for g in ours[1:]] == [t.dtype for t in LOSSES[name](heads)[1]]
    plain = gradients(LOSSES[name], heads, dtype, inside, plain_function)
    assert_as_accurate(ours, plain, gradients(LOSSES[name], exact, None, inside, plain_function))
    assert_bitwise(ours, gradients(LOSSES[name], heads, dtype, inside))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("half", "float32"), ("float32", "half"), ("half", "half")])
@pytest.mark.parametrize("splits", [None, [24, 24]])
def test_lora(dtype, inside, dtypes, splits):
    x, weight, a, b = make(torch.float32, splits)
    x, weight = ((t.detach().to(dtype) if d == "half" else t.detach()) for t, d in zip((x, weight), dtypes))
    x.requires_grad_()
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, a, b)]

    def run_autocast(function=lora_linear):
        with torch.autocast("cpu", dtype):
            if inside:
                return results(x, weight, a, b, splits, function)
            y = function(x, weight, a, b, scale=2.0, splits=splits)
        upstream = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, (x, a, b), upstream)]

    ours, plain = run_autocast(), run_autocast(reference.lora_linear)
    assert [t.dtype for t in ours] == [dtype, x.dtype, a.dtype, b.dtype]
    truth = results(*exact, splits, reference.lora_linear)
    assert_as_accurate(ours, [t.to(o.dtype) for t, o in zip(plain, ours)], truth)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_equal_eager_ones(name):
    heads = make_heads()
    compiled = torch.compile(lambda h: LOSSES[name](h)[0], fullgraph=True, backend="aot_eager")
    inputs = LOSSES[name](heads)[1]
    with torch.autocast("cpu", torch.bfloat16):
        eager, fused = (run(lambda f=f: f(heads), inputs) for f in (lambda h: LOSSES[name](h)[0], compiled))
    assert_bitwise(eager, fused)


def test_compiled_lora_equals_the_eager_one():
    x, weight, a, b = make(splits=[24, 24])
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise(results(x, weight, a, b, [24, 24]), results(x, weight, a, b, [24, 24], compiled))


def test_float64_stays_float64():
    with torch.autocast("cpu", torch.bfloat16):
        assert trajectory(make_heads(torch.float64))[0].dtype == torch.float64
