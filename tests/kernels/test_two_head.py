"""Both losses in one autograd node equal the sum of the two losses, in eager mode and compiled by Inductor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pite_kernels import reference, two_head_loss
from pite_kernels.two_head import two_head_backward, two_head_forward
from tests.kernels.helpers import Heads, assert_as_accurate, assert_bitwise, make_heads

pytestmark = pytest.mark.usefixtures("cpu_path")


def losses_of(heads: Heads, function=two_head_loss, normalizers=(None, None), absent="skip"):
    return function(
        heads.hidden,
        heads.lm_weight,
        heads.target_ids,
        heads.target_rows,
        heads.weight,
        heads.bias,
        heads.targets,
        heads.rows,
        label_smoothing=0.1,
        weight=3.0,
        normalizers=normalizers,
        absent=absent,
    )


def results(heads: Heads, upstream=(0.7, 0.3, -0.2), **options) -> list[torch.Tensor]:
    losses = losses_of(heads, **options)
    total = sum(u * loss for u, loss in zip(upstream, losses) if u)
    gradients = torch.autograd.grad(total, heads.trainable)
    # `assert_as_accurate` expects the gradient of the hidden states second.
    return [losses[0].detach(), *gradients, *(loss.detach() for loss in losses[1:])]


NOTHING = {"tokens": 0, "count": 0, "supervised": 0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absent", ["skip", "regress"])
@pytest.mark.parametrize(
    "shape", [{}, {"count": 0}, {"supervised": 0}, NOTHING, {"absent": 1.0}, {"tokens": 700, "count": 1500}]
)
def test_against_float64(dtype, absent, shape):
    heads = make_heads(dtype, **shape)
    plain = results(heads.to(dtype), function=reference.two_head_loss, absent=absent)
    truth = results(heads.to(torch.float64), function=reference.two_head_loss, absent=absent)
    assert_as_accurate(results(heads, absent=absent), plain, truth)


def test_normalizers():
    heads = make_heads()
    for index in (0, 1):
        normalizers = [torch.tensor(5.0), torch.tensor(9.0)]
        normalizers[index] = torch.tensor(0.0)
        ours, plain = (
            results(heads, function=f, normalizers=tuple(normalizers)) for f in (two_head_loss, reference.two_head_loss)
        )
        for a, b in zip(ours, plain):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["lm_weight", "weight", "bias"])
def test_frozen_inputs(frozen):
    heads = make_heads()
    getattr(heads, frozen).requires_grad_(False)
    expected = make_heads()
    losses_of(heads)[0].backward()
    losses_of(expected, reference.two_head_loss)[0].backward()
    assert getattr(heads, frozen).grad is None
    for name in {"hidden", "lm_weight", "weight", "bias"} - {frozen}:
        torch.testing.assert_close(getattr(heads, name).grad, getattr(expected, name).grad)


def test_repeated_calls_are_bitwise_equal():
    heads = make_heads(tokens=400, count=900, supervised=700)
    assert_bitwise(results(heads), results(heads))
    loss = losses_of(heads)[0]
    first, second = (torch.autograd.grad(loss, heads.trainable, retain_graph=True) for _ in range(2))
    assert_bitwise(first, second)


def test_any_strides():
    heads = make_heads()
    for hidden in (torch.randn(37, 48)[:, 8:40], torch.randn(32, 37).t()):
        strided = replace(heads, hidden=hidden.detach().requires_grad_())
        plain = results(strided.to(torch.float32), function=reference.two_head_loss)
        truth = results(strided.to(torch.float64), function=reference.two_head_loss)
        assert_as_accurate(results(strided), plain, truth)


def test_gradients_accumulate():
    heads = make_heads()
    loss = losses_of(heads)[0]
    once = torch.autograd.grad(loss, heads.trainable, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_bitwise([t.grad for t in heads.trainable], [2 * g for g in once])


def test_raises_the_errors_of_the_two_losses():
    heads = make_heads()
    heads.targets[2, 1, 0, 0] = -1
    heads.targets[2, 1, 0, 1] = 0.5
    with pytest.raises(ValueError, match="target 2"):
        losses_of(heads)
    with pytest.raises(ValueError, match="absent"):
        losses_of(make_heads(), absent="drop")


def test_opcheck():
    heads = make_heads()
    inputs = (heads.target_ids, heads.target_rows, heads.weight, heads.bias, heads.targets, heads.rows)
    arguments = (heads.hidden, heads.lm_weight, *inputs, 0.1, 3.0, None, None, True, True, True)
    torch.library.opcheck(two_head_forward, arguments)
    *_, ce_scale, l1_scale, dx, _, sign = two_head_forward(*arguments)
    hidden, weight = heads.hidden.detach(), heads.weight.detach()
    backward = (ce_scale, l1_scale, dx, heads.target_rows, hidden, weight, sign, heads.rows, True, True, True)
    torch.library.opcheck(two_head_backward, backward)


def test_inductor_equals_eager_bitwise(cpu_path):
    heads = make_heads()
    compiled = torch.compile(two_head_loss, fullgraph=True)
    assert_bitwise(results(heads, (1.0, 0, 0)), results(heads, (1.0, 0, 0), function=compiled))
