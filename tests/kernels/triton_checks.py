"""The Triton kernels against float64, on a GPU or in Triton's interpreter; `test_triton.py` runs this file.

`triton_lora_checks.py` has those of LoRA, `rope_checks.py` those of the rotary embedding and of gathered rows.

bfloat16 is tested on a GPU only: the interpreter multiplies its raw bits.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import pite_kernels.cross_entropy
import pite_kernels.fp8
import pite_kernels.trajectory
from bench.kernels import tiles
from bench.kernels.inputs import Case
from pite_kernels import reference, two_head_loss
from pite_kernels.gpu import cross_entropy, fp8, shared, trajectory
from tests.kernels.helpers import Heads, assert_as_accurate, assert_bitwise, make_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def trajectory_results(heads: Heads, skip: bool = True, normalizer=None, base=None) -> list[Tensor]:
    """The loss and the gradients from the kernels; `base` is a gradient to accumulate into."""
    loss, sign, scale, _ = trajectory.forward(
        heads.hidden, heads.weight, heads.bias, heads.targets, heads.rows, normalizer, skip
    )
    grad_hidden = torch.full_like(heads.hidden, float("nan")) if base is None else base.clone()
    trajectory.write_grad_hidden(grad_hidden, scale, heads.weight, sign, heads.rows, base is not None)
    grad_weight = trajectory.grad_weight(scale, heads.hidden, heads.weight, sign, heads.rows)
    return [loss, grad_hidden, grad_weight]


def cross_entropy_results(heads: Heads, smoothing: float, with_rows: bool = True, ignore_index: int = -100, bias=None):
    rows = heads.target_rows if with_rows else None
    loss, scale, dx, dw, db, _ = cross_entropy.forward(
        heads.hidden,
        heads.lm_weight,
        bias,
        heads.target_ids,
        rows,
        None,
        None,
        smoothing,
        ignore_index,
        True,
        True,
        True,
    )
    return [loss, cross_entropy.scatter_rows(dx, rows, scale, len(heads.hidden)), dw * scale, db * scale]


def assert_repeatable(first: list[Tensor], compute: Callable[[], list[Tensor]]) -> None:
    """A second computation gives the same bits. Only on a GPU: the interpreter runs programs one after another."""
    if DEVICE == "cuda":
        assert_bitwise(first, compute())


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def expected(heads: Heads, loss) -> list[Tensor]:
    with torch.enable_grad():
        value, inputs = loss(heads)
        return [value.detach(), *torch.autograd.grad(value, inputs)]


def compare_trajectory(heads: Heads, absent: str = "skip") -> list[Tensor]:
    def loss(h: Heads):
        return reference.trajectory_l1(h.hidden, h.weight, h.bias, h.targets, h.rows, absent=absent), (
            h.hidden,
            h.weight,
        )

    ours = trajectory_results(heads, absent == "skip")
    plain, truth = (expected(heads.to(d), loss) for d in (heads.hidden.dtype, torch.float64))
    assert_as_accurate(ours, plain, truth)
    return ours


SHAPES = [
    {"tokens": 50, "count": 150, "depth": 48},
    {"points": 1, "frames": 1, "count": 30},
    {"points": 5, "frames": 17, "count": 7, "depth": 80},
    {"points": 3, "frames": 100, "count": 3, "depth": 64},
    {"absent": 1.0},
    {"absent": 0.0, "count": 1},
    {"count": 0},
]
MORE_TILES = [
    {"points": 1, "frames": 100, "count": 37, "depth": 52},
    {"points": 5, "frames": 100, "count": 21, "depth": 136},
    {"points": 5, "frames": 256, "count": 2, "depth": 16},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("absent", "shape"), [*product(("skip", "regress"), SHAPES), *(("skip", shape) for shape in MORE_TILES)]
)
def test_trajectory(dtype, absent, shape):
    compare_trajectory(make_heads(dtype, device=DEVICE, **shape), absent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [5, 100])
def test_trajectory_repeated_rows(dtype, frames):
    """Rows repeat inside a tile and in several tiles; 600 outputs are more than one block of columns."""
    heads = make_heads(dtype, count=150, frames=frames, device=DEVICE)
    heads.rows[:25] = 3
    heads.rows[30:60] = 4
    heads.rows[140:] = 3
    results = compare_trajectory(heads)
    assert_repeatable(results, lambda: trajectory_results(heads))


def test_signs_are_padded_with_zeros():
    """The last K-step of dX reads the columns from the last output on."""
    heads = make_heads(torch.float16, points=3, frames=100, count=7, device=DEVICE)
    _, sign, *_ = trajectory.forward(heads.hidden, heads.weight, heads.bias, heads.targets, heads.rows, None, True)
    assert sign.shape == (7, 640) and sign.dtype == torch.float16
    assert not sign[:, 600:].any() and sign[:, :600].abs().max() == 1


def test_trajectory_accumulates_into_a_gradient():
    heads = make_heads(count=40, device=DEVICE)
    base = torch.randn_like(heads.hidden)
    from_zero, onto = trajectory_results(heads)[1], trajectory_results(heads, base=base)[1]
    torch.testing.assert_close(onto, base + from_zero)


def test_trajectory_splits_rows_in_a_fixed_order(monkeypatch):
    heads = make_heads(tokens=300, count=200, device=DEVICE)
    whole = trajectory_results(heads)[2]
    monkeypatch.setattr(trajectory, "row_splits", lambda *_: 3)
    torch.testing.assert_close(trajectory_results(heads)[2], whole)


def test_trajectory_normalizers_and_strides():
    heads = make_heads(device=DEVICE)
    for result in trajectory_results(heads, normalizer=torch.zeros((), device=DEVICE)):
        assert torch.count_nonzero(result) == 0
    wide = torch.zeros(37, 48, device=DEVICE)
    wide[:, 8:40] = heads.hidden
    strided = Heads(wide[:, 8:40], *(getattr(heads, n) for n in list(Heads.__dataclass_fields__)[1:]))
    assert_bitwise(trajectory_results(heads), trajectory_results(strided))


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assert ends the process")
@pytest.mark.parametrize("values", [(-1.0, 0.5), (float("nan"), 0.5), (0.5, float("inf"))])
def test_trajectory_asserts_on_invalid_targets(values):
    heads = make_heads()
    heads.targets[5, 1, 2] = torch.tensor(values)
    with pytest.raises(RuntimeError, match="not finite or half absent"):
        trajectory_results(heads)
    heads = make_heads()
    heads.rows[3] = 37
    with pytest.raises(RuntimeError, match="out of range"):
        trajectory_results(heads)


def compare_cross_entropy(heads: Heads, smoothing: float, with_rows: bool = True) -> None:
    bias = torch.linspace(-1, 1, len(heads.lm_weight), device=DEVICE).to(heads.hidden.dtype)

    def loss(h: Heads):
        own = bias.to(h.hidden.dtype).requires_grad_()
        rows = h.target_rows if with_rows else None
        value = reference.linear_cross_entropy(
            h.hidden, h.lm_weight, h.target_ids, rows, bias=own, label_smoothing=smoothing
        )
        return value, (h.hidden, h.lm_weight, own)

    ours = cross_entropy_results(heads, smoothing, with_rows, bias=bias)
    plain, truth = (expected(heads.to(d), loss) for d in (heads.hidden.dtype, torch.float64))
    assert_as_accurate(ours, plain, truth)
    assert_repeatable(ours, lambda: cross_entropy_results(heads, smoothing, with_rows, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [{}, {"supervised": 40, "tokens": 9}, {"supervised": 5, "vocabulary": 9003}])
def test_cross_entropy(dtype, smoothing, shape):
    heads = make_heads(dtype, device=DEVICE, **shape)
    heads.target_ids[2] = -100
    compare_cross_entropy(heads, smoothing)


def test_cross_entropy_in_chunks_without_rows(monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 16)
    compare_cross_entropy(make_heads(supervised=37, device=DEVICE), 0.1, with_rows=False)


def test_cross_entropy_without_supervised_rows():
    for result in cross_entropy_results(make_heads(supervised=0, device=DEVICE), 0.1):
        assert torch.count_nonzero(result) == 0


def test_cross_entropy_extreme_logits():
    heads = make_heads(device=DEVICE)
    heads.hidden.mul_(1e4)
    compare_cross_entropy(heads, 0.1)


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assert ends the process")
def test_cross_entropy_asserts_on_invalid_ids_and_rows():
    for name, bad in (("target_ids", 50), ("target_ids", -3), ("target_rows", 37)):
        heads = make_heads()
        getattr(heads, name)[4] = bad
        with pytest.raises(RuntimeError, match="not in the vocabulary"):
            cross_entropy_results(heads, 0.1)


def test_far_rows_are_addressed_in_64_bits():
    torch.use_deterministic_algorithms(False)
    stride = 2**30 + 5
    far = torch.empty(2 * stride + 32, device=DEVICE, dtype=torch.float16).as_strided((3, 32), (stride, 1))
    heads = make_heads(torch.float16, tokens=3, device=DEVICE)
    far.copy_(heads.hidden)
    moved = Heads(far, *(getattr(heads, n) for n in list(Heads.__dataclass_fields__)[1:]))
    near, got = (trajectory.forward(h.hidden, h.weight, h.bias, h.targets, h.rows, None, True) for h in (heads, moved))
    assert_bitwise(near, got)
    weights = [trajectory.grad_weight(near[2], h.hidden, h.weight, near[1], h.rows) for h in (heads, moved)]
    assert torch.equal(*weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(5, 48), (3, 5000), (0, 64)])
def test_rows_are_quantized_as_in_pytorch(dtype, count, width):
    """A row of 5,000 numbers takes two blocks. One row is all zeros, two have a number that is not finite."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(count, 2 * width, generator=g).to(DEVICE, dtype)[:, :width]
    finite = torch.ones(count, dtype=torch.bool)
    if count:
        x[0], x[1, 7], x[2, 3] = 0, torch.inf, torch.nan
        finite[1:3] = False
    # On the CPU the dispatcher uses PyTorch.
    expected = pite_kernels.fp8.quantize_rows(x.cpu())
    ours = [t.cpu() for t in fp8.quantize_rows(x, pite_kernels.fp8.FP8, pite_kernels.fp8.SMALLEST_ROW)]
    assert torch.equal(ours[1][finite], expected[1][finite])
    assert torch.equal(ours[0].view(torch.uint8)[finite], expected[0].view(torch.uint8)[finite])
    assert ours[1][~finite].isnan().all(), "the whole row becomes NaN"


def test_zero_rows_leaves_the_others():
    out = torch.ones(6, 2100, device=DEVICE)
    shared.zero_rows(out, torch.tensor([1, -1, 2, -1, 0, 5], device=DEVICE), -1)
    assert out.sum(1).tolist() == [2100, 0, 2100, 0, 2100, 2100]


def test_chunks_fill_whole_waves():
    assert cross_entropy.chunk_rows(32000, 4096, 132) == 2048
    assert cross_entropy.chunk_rows(32000, 5120, 132) == 1664, "16 x 20 tiles would be two and a half waves"


def test_row_splits_fill_whole_waves():
    assert trajectory.row_splits(160, 16384, 132) in range(2, 9)
    assert trajectory.row_splits(160, 100, 132) == 1


@pytest.fixture
def triton_on_any_device(monkeypatch):
    """Without a GPU, the dispatcher runs Triton in its interpreter."""
    for module in (pite_kernels.trajectory, pite_kernels.cross_entropy):
        monkeypatch.setattr(module, "uses_triton", lambda tensor: tensor.dtype != torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [{}, {"count": 0}, {"supervised": 0}, {"count": 60, "supervised": 60}])
@pytest.mark.usefixtures("triton_on_any_device")
def test_two_heads_through_the_public_function(dtype, shape):
    """End to end, with autograd."""
    heads = make_heads(dtype, device=DEVICE, **shape)

    def loss(h: Heads, function=reference.two_head_loss):
        inputs = (h.hidden, h.lm_weight, h.target_ids, h.target_rows, h.weight, h.bias, h.targets, h.rows)
        value, _, _ = function(*inputs, label_smoothing=0.1, weight=2.0, normalizers=(None, None))
        return value, h.trainable

    ours = expected(heads, lambda h: loss(h, two_head_loss))
    plain, truth = (expected(heads.to(d), loss) for d in (dtype, torch.float64))
    assert_as_accurate(ours, plain, truth)
    # A second call: nothing of the first is left in a buffer.
    assert_bitwise(ours, expected(heads, lambda h: loss(h, two_head_loss)))


def compare_public(heads: Heads, loss, **options) -> None:
    """The loss through the public function, with autograd, against the reference with the same options."""

    def value(h: Heads, module):
        result, inputs = loss(h, module, {k: v.to(h.hidden) if torch.is_tensor(v) else v for k, v in options.items()})
        return (result.square().sum() if result.dim() else result), inputs

    ours = expected(heads, lambda h: value(h, pite_kernels))
    plain, truth = (expected(heads.to(d), lambda h: value(h, reference)) for d in (heads.hidden.dtype, torch.float64))
    assert_as_accurate(ours, plain, truth)
    assert_repeatable(ours, lambda: expected(heads, lambda h: value(h, pite_kernels)))


@pytest.mark.usefixtures("triton_on_any_device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_of_tokens(dtype, reduction):
    heads = make_heads(dtype, supervised=40, tokens=9, device=DEVICE)
    heads.target_ids[2:5] = -100
    bias = torch.linspace(-1, 1, len(heads.lm_weight), device=DEVICE)

    def loss(h: Heads, module, options):
        own = bias.to(h.hidden).requires_grad_()
        arguments = h.hidden, h.lm_weight, h.target_ids, h.target_rows
        return module.linear_cross_entropy(*arguments, bias=own, label_smoothing=0.1, **options), (*arguments[:2], own)

    compare_public(heads, loss, weights=torch.linspace(0, 2, 40, device=DEVICE), reduction=reduction)


@pytest.mark.usefixtures("triton_on_any_device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [{"count": 150, "frames": 100}, {"count": 0}, {"points": 1, "frames": 1}])
def test_weights_of_targets(dtype, reduction, shape):
    """600 outputs are several blocks of columns, and rows repeat."""
    heads = make_heads(dtype, device=DEVICE, **shape)
    heads.rows[:25] = 3

    def loss(h: Heads, module, options):
        inputs = h.hidden, h.weight, h.bias
        return module.trajectory_l1(*inputs, h.targets, h.rows, **options), inputs

    compare_public(heads, loss, weights=torch.linspace(0, 2, len(heads.rows), device=DEVICE), reduction=reduction)


def test_other_tiles_are_timed_only_where_they_agree(monkeypatch):
    monkeypatch.setattr("bench.kernels.inputs.FRAMES", 10)  # the interpreter needs seconds for 600 outputs
    one = [tiles.tile(64, 128, 64, 4, 3)]
    monkeypatch.setattr(tiles, "CANDIDATES", dict.fromkeys(tiles.CANDIDATES, one))
    case = Case("trajectory", 20, 32, 0.5, dtype=torch.float16)
    records = tiles.measure_tiles(case, torch.device(DEVICE), rounds=1)
    assert [(r["kernel"], r["tiles"]) for r in records] == [
        (kernel, name) for kernel in ("forward", "hidden", "weight") for name in ("shipped", "64 128 64 4 3")
    ]
    assert all(r["median_ms"] > 0 and r["problem"] is None for r in records)
    monkeypatch.setattr(tiles, "differ", lambda a, b: True)
    assert {r["problem"] for r in tiles.measure_tiles(case, torch.device(DEVICE), rounds=1)} == {"wrong"}
