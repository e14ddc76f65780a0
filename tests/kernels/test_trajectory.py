"""The trajectory L1 loss on the CPU: accuracy, edge cases, errors, autograd and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pite_kernels import FusedTrajectoryL1Loss, reference, trajectory_l1
from pite_kernels.trajectory import target_losses, trajectory_backward, trajectory_forward
from tests.kernels.helpers import Heads, assert_as_accurate, assert_bitwise, make_heads, run

pytestmark = pytest.mark.usefixtures("cpu_path")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def loss_of(heads: Heads, function=trajectory_l1, **options):
    return lambda: function(heads.hidden, heads.weight, heads.bias, heads.targets, heads.rows, **options)


def trainable(heads: Heads):
    return heads.hidden, heads.weight, heads.bias


def compare(heads: Heads, **options) -> list[torch.Tensor]:
    ours = run(loss_of(heads, **options), trainable(heads))
    plain_heads, exact = heads.to(heads.hidden.dtype), heads.to(torch.float64)
    plain = run(loss_of(plain_heads, reference.trajectory_l1, **options), trainable(plain_heads))
    truth = run(loss_of(exact, reference.trajectory_l1, **options), trainable(exact))
    assert_as_accurate(ours, plain, truth)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", ["skip", "regress"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"points": 1, "frames": 1},
        {"points": 5, "frames": 17, "depth": 48},
        {"points": 5, "frames": 256, "depth": 16},
        {"tokens": 1300, "count": 2100, "depth": 16},
        {"absent": 0.0},
    ],
)
def test_against_float64(dtype, absent, shape):
    compare(make_heads(dtype, **shape), absent=absent)


def test_absent_points_have_no_loss():
    heads = make_heads(absent=0.0)
    heads.targets[4, 1, 2] = -1
    one_absent = compare(heads)
    by_hand = (heads.hidden[heads.rows] @ heads.weight.T + heads.bias).view_as(heads.targets) - heads.targets
    by_hand = torch.where(heads.targets == -1, 0, by_hand).abs().sum() / (heads.targets.numel() - 2)
    torch.testing.assert_close(one_absent[0], by_hand.detach())


@pytest.mark.parametrize("shape", [{"count": 0}, {"count": 0, "tokens": 0}, {"absent": 1.0}])
def test_the_loss_without_targets_is_zero_not_nan(shape):
    heads = make_heads(**shape)
    for result in run(loss_of(heads), trainable(heads)):
        assert torch.count_nonzero(result) == 0


def test_normalizer_zero_is_zero_not_nan():
    heads = make_heads()
    for result in run(loss_of(heads, normalizer=torch.tensor(0.0)), trainable(heads)):
        assert torch.count_nonzero(result) == 0


def test_normalizer_of_the_global_batch():
    heads = make_heads()
    count = (heads.targets != -1).sum().float()
    own, twice = (run(loss_of(heads, normalizer=n), trainable(heads)) for n in (None, 2 * count))
    for a, b in zip(own, twice):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("rows", [[5] * 11, list(range(11)), list(range(20, 9, -1))])
def test_rows_repeated_consecutive_descending(rows):
    compare(replace(make_heads(), rows=torch.tensor(rows)))


def test_any_strides():
    heads = make_heads(depth=32)
    wide = torch.randn(37, 48)[:, 8:40].detach().requires_grad_()
    compare(replace(heads, hidden=wide))
    turned = torch.randn(32, 37).t().detach().requires_grad_()
    strided = torch.randn(64, 30).t()[:, ::2].detach().requires_grad_()
    compare(replace(heads, hidden=turned, weight=strided))


def test_more_than_two_to_the_31_elements():
    torch.use_deterministic_algorithms(False)  # otherwise all 8 GB are filled, not only the pages that are read
    stride = 2**30 + 5
    far = torch.empty(2 * stride + 32).as_strided((3, 32), (stride, 1))
    near = torch.randn(3, 32)
    far.copy_(near)
    heads = make_heads(tokens=3)
    expected, got = (
        run(loss_of(h), trainable(h)) for h in (replace(heads, hidden=x.requires_grad_()) for x in (near, far))
    )
    assert_bitwise(expected, got)


def test_each_gradient_has_the_dtype_of_its_input():
    heads = make_heads(torch.bfloat16)
    weight, bias = (t.detach().float().requires_grad_() for t in (heads.weight, heads.bias))
    mixed = replace(heads, weight=weight, bias=bias)
    results = run(loss_of(mixed), trainable(mixed))
    assert [r.dtype for r in results] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    exact = heads.to(torch.float64)
    truth = run(loss_of(exact, reference.trajectory_l1), trainable(exact))
    plain_heads = heads.to(torch.bfloat16)
    plain = run(loss_of(plain_heads, reference.trajectory_l1), trainable(plain_heads))
    assert_as_accurate(results, plain, truth)


def test_no_bias_and_frozen_inputs():
    heads = make_heads()
    frozen = heads.weight.detach()
    loss = trajectory_l1(heads.hidden, frozen, None, heads.targets, heads.rows)
    expected = reference.trajectory_l1(heads.hidden, frozen, None, heads.targets, heads.rows)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, heads.hidden), torch.autograd.grad(expected, heads.hidden)):
        torch.testing.assert_close(a, b)
    head_only = trajectory_l1(heads.hidden.detach(), heads.weight, heads.bias, heads.targets, heads.rows)
    head_only.backward()
    assert heads.hidden.grad is None
    assert heads.weight.grad is not None


def test_gradients_accumulate():
    heads = make_heads()
    loss = loss_of(heads)()
    once = torch.autograd.grad(loss, trainable(heads), retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(trainable(heads), once):
        torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=0, atol=0)


def test_repeated_calls_are_bitwise_equal():
    heads = make_heads(tokens=600, count=1500, depth=64)
    runs = [run(loss_of(heads), trainable(heads)) for _ in range(3)]
    assert_bitwise(runs[0], runs[1])
    assert_bitwise(runs[0], runs[2])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ((-1.0, 0.5), "-1.0, 0.5"),
        ((0.5, -1.0), "0.5, -1.0"),
        ((float("nan"), 0.5), "nan"),
        ((0.5, float("inf")), "inf"),
    ],
)
def test_the_error_names_a_bad_target(target, message):
    heads = make_heads()
    heads.targets[7, 2, 3] = torch.tensor(target)
    with pytest.raises(ValueError, match=rf"target 7 \(point 2, frame 3\).*{message}"):
        loss_of(heads)()


def test_regress_allows_one_coordinate_at_minus_one():
    heads = make_heads()
    heads.targets[7, 2, 3] = torch.tensor([-1.0, 0.5])
    compare(heads, absent="regress")


@pytest.mark.parametrize("row", [-1, 37])
def test_the_error_names_a_row_out_of_range(row):
    heads = make_heads()
    heads.rows[3] = row
    with pytest.raises(ValueError, match=rf"rows\[3\] = {row}"):
        loss_of(heads)()


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.randn(29, 32)},
        {"weight": torch.randn(30, 31)},
        {"bias": torch.randn(29)},
        {"rows": torch.zeros(10, dtype=torch.int64)},
        {"rows": torch.zeros(11, dtype=torch.int32)},
        {"targets": torch.rand(11, 15, 2)},
    ],
)
def test_shapes_that_do_not_fit_raise(change):
    with pytest.raises(ValueError, match="trajectory_l1"):
        loss_of(replace(make_heads(), **change))()


def test_invalid_options_raise():
    with pytest.raises(ValueError, match="absent"):
        loss_of(make_heads(), absent="drop")()
    with pytest.raises(ValueError, match="absent"):
        FusedTrajectoryL1Loss("drop")
    with pytest.raises(ValueError, match="'mean' or 'none', not 'sum'"):
        FusedTrajectoryL1Loss(reduction="sum")
    with pytest.raises(ValueError, match="normalizer"):
        loss_of(make_heads(), normalizer=torch.ones(1))()
    with pytest.raises(ValueError, match="hidden is on cpu, another input on meta"):
        loss_of(make_heads(), normalizer=torch.ones((), device="meta"))()


def test_the_module_equals_the_function():
    heads = make_heads()
    loss = FusedTrajectoryL1Loss("regress")(heads.hidden, heads.weight, heads.bias, heads.targets, heads.rows)
    assert torch.equal(loss, loss_of(heads, absent="regress")())


def weights_of(heads):
    return torch.linspace(0, 2, len(heads.rows), dtype=heads.hidden.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absent", ["skip", "regress"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_and_the_losses_themselves(dtype, absent, reduction):
    heads = make_heads(dtype)
    heads.rows[3] = heads.rows[1]
    exact = heads.to(torch.float64)

    def results(heads, function):
        options = {"weights": weights_of(heads), "absent": absent, "reduction": reduction}
        losses = loss_of(heads, function, **options)()
        assert losses.shape == (heads.rows.shape if reduction == "none" else ())
        return run(lambda: torch.log1p(losses).sum(), trainable(heads))

    plain = results(heads.to(dtype), reference.trajectory_l1)
    ours = results(heads, trajectory_l1)
    assert_as_accurate(ours, plain, results(exact, reference.trajectory_l1))
    assert_bitwise(results(heads, trajectory_l1), ours)
    if dtype == torch.float32:  # one program for each dtype would be too many
        assert_bitwise(results(heads, torch.compile(trajectory_l1, fullgraph=True, backend="aot_eager")), ours)


def test_equal_weights_change_nothing_and_the_module_passes_them_on():
    heads = make_heads()
    inputs = heads.hidden, heads.weight, heads.bias, heads.targets, heads.rows
    weighted = FusedTrajectoryL1Loss()(*inputs, weights=torch.full((11,), 3.0))
    torch.testing.assert_close(weighted, trajectory_l1(*inputs))
    each = FusedTrajectoryL1Loss(reduction="none")(*inputs)
    torch.testing.assert_close(each.sum() / (heads.targets != -1).sum(), trajectory_l1(*inputs))
    for count, options in ((0, {"weights": torch.zeros(0)}), (11, {"weights": torch.zeros(11)})):
        assert loss_of(make_heads(count=count), **options)() == 0


def test_half_precision_weights_are_summed_in_float32():
    """150 targets of 600 coordinates are more than float16 can count."""
    heads = make_heads(torch.float16, count=150, points=3, frames=100, absent=0.0)
    weights = torch.ones(150, dtype=torch.float16)
    torch.testing.assert_close(loss_of(heads, weights=weights)(), loss_of(heads)())


def test_tiny_upstream_gradients_do_not_vanish_in_half_precision():
    """1 / normalizer of a large batch is below float16's smallest number, and the gradient of the head in float32 is not."""
    heads = make_heads(torch.float16)
    weight = heads.weight.detach().float().requires_grad_()
    inputs = heads.hidden, weight, heads.bias, heads.targets, heads.rows
    each = trajectory_l1(*inputs, reduction="none")
    large, small = (
        torch.autograd.grad(each.sum() * scale, weight, retain_graph=True)[0] / scale for scale in (1, 1e-9)
    )
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    heads = make_heads()
    arguments = (heads.hidden, heads.weight, heads.bias if bias else None, heads.targets, heads.rows, None, True)
    torch.library.opcheck(trajectory_forward, arguments)
    _, sign, scale = trajectory_forward(*arguments)
    detached = heads.hidden.detach(), heads.weight.detach()
    torch.library.opcheck(trajectory_backward, (scale, *detached, sign, heads.rows, True, bias, True))
    torch.library.opcheck(target_losses, (*arguments[:5], True))


def test_compiled_equals_eager_bitwise():
    heads = make_heads()
    compiled = torch.compile(trajectory_l1, fullgraph=True, backend="aot_eager")
    assert_bitwise(
        run(loss_of(heads), trainable(heads), upstream=1.0),
        run(loss_of(heads, compiled), trainable(heads), upstream=1.0),
    )
