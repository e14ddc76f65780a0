"""Cross-entropy of the vocabulary head on the CPU: accuracy, smoothing, ignored ids, errors, autograd, compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pite_kernels import FusedLinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, reference
from pite_kernels.cross_entropy import cross_entropy_forward, scatter_rows, token_losses
from tests.kernels.helpers import Heads, assert_as_accurate, assert_bitwise, make_heads, run

pytestmark = pytest.mark.usefixtures("cpu_path")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def loss_of(heads: Heads, function=linear_cross_entropy, **options):
    return lambda: function(heads.hidden, heads.lm_weight, heads.target_ids, heads.target_rows, **options)


def trainable(heads: Heads):
    return heads.hidden, heads.lm_weight


def compare(heads: Heads, **options) -> list[torch.Tensor]:
    ours = run(loss_of(heads, **options), trainable(heads))
    plain_heads, exact = heads.to(heads.hidden.dtype), heads.to(torch.float64)
    plain = run(loss_of(plain_heads, reference.linear_cross_entropy, **options), trainable(plain_heads))
    truth = run(loss_of(exact, reference.linear_cross_entropy, **options), trainable(exact))
    assert_as_accurate(ours, plain, truth)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape",
    [{}, {"supervised": 1}, {"supervised": 300, "vocabulary": 1000}, {"tokens": 9, "supervised": 40, "depth": 48}],
)
def test_against_float64(dtype, smoothing, shape):
    compare(make_heads(dtype, **shape), label_smoothing=smoothing)


def test_chunks_add_up(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_LOGITS_PER_CHUNK", 1)
    compare(make_heads(tokens=200, supervised=150), label_smoothing=0.1)


@pytest.mark.parametrize("with_rows", [True, False])
def test_ignored_ids_equal_removed_rows(with_rows):
    heads = make_heads(supervised=37)
    rows = heads.target_rows if with_rows else torch.arange(37)
    kept = torch.arange(37) % 3 != 1
    short = replace(heads, target_ids=heads.target_ids[kept], target_rows=rows[kept])
    ids = heads.target_ids.where(kept, -7)

    def ignoring():
        return linear_cross_entropy(
            heads.hidden, heads.lm_weight, ids, rows if with_rows else None, label_smoothing=0.1, ignore_index=-7
        )

    expected = run(loss_of(short, label_smoothing=0.1), trainable(short))
    for a, b in zip(run(ignoring, trainable(heads)), expected):
        torch.testing.assert_close(a, b)


def test_the_loss_without_supervised_rows_is_zero_not_nan():
    for heads in (make_heads(supervised=0), replace(make_heads(), target_ids=torch.full((13,), -100))):
        for result in run(loss_of(heads, label_smoothing=0.1), trainable(heads)):
            assert torch.count_nonzero(result) == 0


def test_normalizer():
    heads = make_heads()
    for result in run(loss_of(heads, normalizer=torch.tensor(0.0)), trainable(heads)):
        assert torch.count_nonzero(result) == 0
    own, twice = (run(loss_of(heads, normalizer=n), trainable(heads)) for n in (None, torch.tensor(26.0)))
    for a, b in zip(own, twice):
        torch.testing.assert_close(a, 2 * b)


def test_bias_and_its_gradient():
    heads = make_heads()
    bias = torch.randn(50, requires_grad=True)
    ours = run(loss_of(heads, bias=bias, label_smoothing=0.1), (*trainable(heads), bias))
    plain = run(
        loss_of(heads, reference.linear_cross_entropy, bias=bias, label_smoothing=0.1), (*trainable(heads), bias)
    )
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)


def test_frozen_head_has_no_weight_gradient():
    heads = make_heads()
    frozen = heads.lm_weight.detach()
    outputs = cross_entropy_forward(
        heads.hidden, frozen, None, heads.target_ids, heads.target_rows, None, None, 0.1, -100, True, False, False
    )
    assert outputs[3].numel() == outputs[4].numel() == 0
    loss = linear_cross_entropy(heads.hidden, frozen, heads.target_ids, heads.target_rows, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, heads.hidden)
    torch.testing.assert_close(gradient, compare(heads, label_smoothing=0.1)[1] / 1.7)


def test_without_gradients_only_the_loss_is_computed():
    heads = make_heads()
    with torch.no_grad():
        loss = loss_of(heads)()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, loss_of(heads)().detach())


def test_any_strides_and_repeated_rows():
    heads = make_heads()
    wide = torch.randn(37, 48)[:, 8:40].detach().requires_grad_()
    turned = torch.randn(32, 37).t().detach().requires_grad_()
    head = torch.randn(32, 50).t().detach().requires_grad_()
    compare(replace(heads, hidden=wide, target_rows=torch.zeros(13, dtype=torch.int64)), label_smoothing=0.1)
    compare(replace(heads, hidden=turned, lm_weight=head), label_smoothing=0.1)


def test_no_rows_of_hidden():
    for result in run(
        loss_of(empty := make_heads(tokens=0, supervised=0, count=0), label_smoothing=0.1), trainable(empty)
    ):
        assert torch.count_nonzero(result) == 0


def test_more_than_two_to_the_31_elements():
    torch.use_deterministic_algorithms(False)  # otherwise all 8 GB are filled, not only the pages that are read
    stride = 2**30 + 5
    far = torch.empty(2 * stride + 32).as_strided((3, 32), (stride, 1))
    heads = make_heads(tokens=3)
    far.copy_(heads.hidden.detach())
    moved = replace(heads, hidden=far.requires_grad_())
    assert_bitwise(*(run(loss_of(h, label_smoothing=0.1), trainable(h)) for h in (heads, moved)))


def test_extreme_logits_stay_finite():
    heads = make_heads()
    huge = replace(heads, hidden=(heads.hidden.detach() * 1e4).requires_grad_())
    compare(huge, label_smoothing=0.1)


def test_gradients_accumulate_and_repeat_bitwise():
    heads = make_heads(tokens=400, supervised=500, vocabulary=300)
    loss = loss_of(heads, label_smoothing=0.1)()
    once = torch.autograd.grad(loss, trainable(heads), retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_bitwise([leaf.grad for leaf in trainable(heads)], [2 * g for g in once])
    assert_bitwise(once, torch.autograd.grad(loss_of(heads, label_smoothing=0.1)(), trainable(heads)))


@pytest.mark.parametrize("bad", [-1, 50])
def test_the_error_names_an_id_out_of_vocabulary(bad):
    heads = make_heads()
    heads.target_ids[5] = bad
    with pytest.raises(ValueError, match=f"target id {bad} is not in the vocabulary of 50"):
        loss_of(heads)()


def test_invalid_arguments_raise():
    heads = make_heads()
    with pytest.raises(ValueError, match=r"rows\[2\] = 37"):
        loss_of(replace(heads, target_rows=heads.target_rows.index_fill(0, torch.tensor(2), 37)))()
    for change in (
        {"target_ids": heads.target_ids[:5]},
        {"target_ids": heads.target_ids.int()},
        {"target_rows": heads.target_rows.int()},
        {"lm_weight": torch.randn(50, 31)},
    ):
        with pytest.raises(ValueError, match="linear_cross_entropy"):
            loss_of(replace(heads, **change))()
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match="label_smoothing"):
            loss_of(heads, label_smoothing=smoothing)()
        with pytest.raises(ValueError, match="label_smoothing"):
            FusedLinearCrossEntropyLoss(smoothing)


def test_the_module_equals_torch():
    heads = make_heads(supervised=37)
    loss = FusedLinearCrossEntropyLoss(label_smoothing=0.1)(heads.hidden, heads.lm_weight, heads.target_ids)
    expected = F.cross_entropy(heads.hidden @ heads.lm_weight.T, heads.target_ids, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def weighted(heads: Heads) -> Heads:
    """Some targets ignored, some rows repeated; and weights, one of them 0."""
    heads.target_ids[::4] = -100
    heads.target_rows[3] = heads.target_rows[1]
    return heads


def weights_of(heads: Heads) -> torch.Tensor:
    return torch.linspace(0, 2, len(heads.target_ids), dtype=heads.hidden.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalizer", [None, torch.tensor(9.0)])
def test_weights(dtype, normalizer):
    heads = weighted(make_heads(dtype))

    def results(heads: Heads, function) -> list[torch.Tensor]:
        bias = torch.linspace(-1, 1, 50, dtype=heads.hidden.dtype, requires_grad=True)
        options = {"bias": bias, "weights": weights_of(heads), "normalizer": normalizer, "label_smoothing": 0.1}
        return run(loss_of(heads, function, **options), (*trainable(heads), bias))

    plain, truth = (results(heads.to(d), reference.linear_cross_entropy) for d in (dtype, torch.float64))
    assert_as_accurate(results(heads, linear_cross_entropy), plain, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("with_weights", [True, False])
def test_the_losses_themselves(dtype, frozen, with_weights):
    """As in DPO: the losses of each answer are summed, and a function of the sums is differentiated."""
    heads = weighted(make_heads(dtype))
    if frozen:
        heads = replace(heads, lm_weight=heads.lm_weight.detach())
    exact = heads.to(torch.float64)

    def results(heads: Heads, function) -> list[torch.Tensor]:
        options = {"weights": weights_of(heads)} if with_weights else {}
        losses = loss_of(heads, function, reduction="none", label_smoothing=0.1, **options)()
        assert losses.shape == heads.target_ids.shape and not losses[heads.target_ids == -100].any()
        value = torch.sigmoid(losses[:5].sum() - losses[5:].sum() / 3)
        return [value.detach(), *torch.autograd.grad(value, trainable(heads)[: 1 if frozen else 2])]

    plain = results(heads.to(dtype), reference.linear_cross_entropy)
    assert_as_accurate(results(heads, linear_cross_entropy), plain, results(exact, reference.linear_cross_entropy))
    ours = results(heads, linear_cross_entropy)
    assert_bitwise(results(heads, linear_cross_entropy), ours)
    if dtype == torch.float32:  # one program for each dtype would be too many
        compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
        assert_bitwise(results(heads, compiled), ours)


def test_the_losses_equal_their_mean_and_the_module_passes_the_options_on():
    heads = make_heads(supervised=37)
    arguments = heads.hidden, heads.lm_weight, heads.target_ids
    losses = FusedLinearCrossEntropyLoss(reduction="none")(*arguments, weights=torch.full((37,), 2.0))
    torch.testing.assert_close(losses.mean() / 2, linear_cross_entropy(*arguments))


def test_half_precision_weights_are_summed_in_float32():
    """In float16 70,000 ones are infinite, and a loss divided by that is 0."""
    heads = make_heads(torch.float16, supervised=10)
    rows, ids = (t.repeat(7000) for t in (heads.target_rows, heads.target_ids))
    arguments = heads.hidden, heads.lm_weight, ids, rows
    loss = linear_cross_entropy(*arguments, weights=torch.ones(70_000, dtype=torch.float16))
    torch.testing.assert_close(loss, linear_cross_entropy(*arguments))
    assert linear_cross_entropy(*arguments, weights=torch.ones(70_000, dtype=torch.float64)).dtype == torch.float32


def test_tiny_gradients_of_losses_reach_a_trained_head_in_half_precision():
    heads = make_heads(torch.float16)
    weight = heads.lm_weight.detach().float().requires_grad_()
    each = linear_cross_entropy(heads.hidden, weight, heads.target_ids, heads.target_rows, reduction="none")
    large, small = (torch.autograd.grad(each.sum() * s, weight, retain_graph=True)[0] / s for s in (1, 1e-9))
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "sum"}, "'mean' or 'none', not 'sum'"),
        ({"reduction": "none", "normalizer": torch.tensor(1.0)}, "leave the normalizer out"),
        ({"weights": torch.ones(12)}, r"weights must be floating \(13,\)"),
        ({"weights": torch.ones(13, dtype=torch.int64)}, "weights must be floating"),
        ({"weights": torch.ones(13, requires_grad=True)}, "without gradients"),
    ],
)
def test_wrong_weights_and_reductions_raise(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(make_heads(), **options)()


def test_the_module_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="'mean' or 'none', not 'sum'"):
        FusedLinearCrossEntropyLoss(reduction="sum")


@pytest.mark.parametrize("with_rows", [True, False])
def test_opcheck(with_rows):
    heads = make_heads(supervised=37)
    rows = heads.target_rows if with_rows else None
    inputs = heads.hidden, heads.lm_weight, None, heads.target_ids, rows
    for weights in (None, torch.rand(37)):
        torch.library.opcheck(cross_entropy_forward, (*inputs, None, weights, 0.1, -100, True, True, False))
    for coefficient in (torch.tensor(0.5), torch.rand(37)):
        torch.library.opcheck(scatter_rows, (torch.randn(37, 32), rows, coefficient, 37))
    torch.library.opcheck(token_losses, (*inputs, 0.1, -100, True))


def test_compiled_equals_eager_bitwise():
    heads = make_heads()
    ids = heads.target_ids.clone()
    ids[3] = -100
    ignored = replace(heads, target_ids=ids)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    eager, graph = (
        run(loss_of(ignored, f, label_smoothing=0.1), trainable(ignored), 1.0) for f in (linear_cross_entropy, compiled)
    )
    assert_bitwise(eager, graph)
