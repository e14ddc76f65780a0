"""Gathering rows with repetition: values, gradients in a fixed order and in float32, what is saved, tracing."""

from __future__ import annotations

import pytest
import torch

from pite_kernels import gather_rows, put_rows, row_index, take_rows
from pite_kernels.rows import gather_rows_forward, sum_rows
from tests.kernels.helpers import assert_as_accurate, assert_bitwise

CASES = [(9, [0, 1, 2, 0, 1, 2, 3, 8, 0]), (4, []), (1, [0] * 70), (6, [5, 5, 4]), (0, [])]


def results(function, x, upstream):
    out = function(x)
    return [out.detach(), torch.autograd.grad(out, x, upstream)[0]]


def test_rows_of_one_number():
    index = row_index(torch.tensor([2, 0, 2]), 3)
    x = torch.randn(3).requires_grad_()
    _, gradient = results(lambda t: gather_rows(t, index), x, torch.tensor([1.0, 2.0, 4.0]))
    assert gradient.tolist() == [2, 0, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "rows"), CASES)
def test_against_float64(dtype, count, rows):
    rows = torch.tensor(rows, dtype=torch.int64)
    index = row_index(rows, count)
    x = torch.randn(count, 3, 5).to(dtype).requires_grad_()
    upstream = torch.randn(len(rows), 3, 5).to(dtype)
    exact = x.detach().double().requires_grad_()
    ours = results(lambda t: gather_rows(t, index), x, upstream)
    plain = results(lambda t: t[rows], x, upstream)
    truth = results(lambda t: t[rows], exact, upstream.double())
    assert torch.equal(ours[0], plain[0])
    assert_as_accurate(ours, plain, truth)


def test_the_sum_is_in_float32():
    """256 copies of a gradient of 1 + 1/128: a sum in bfloat16 would stop growing."""
    index = row_index(torch.zeros(256, dtype=torch.int64), 1)
    grad = torch.full((256, 2), 1 + 2**-7, dtype=torch.bfloat16)
    assert sum_rows(grad, index.inverse, index.offsets).tolist() == [[258.0, 258.0]]


def test_strided_inputs_and_gradients():
    index = row_index(torch.tensor([0, 2, 2, 1]), 3)
    x = torch.randn(3, 10, 4)[:, 2:7].requires_grad_()
    upstream = torch.randn(5, 4, 4).transpose(0, 1)
    ours, plain = (results(f, x, upstream) for f in (lambda t: gather_rows(t, index), lambda t: t[index.rows]))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)
    assert_bitwise(ours, results(lambda t: gather_rows(t, index), x, upstream))


def test_only_the_lists_are_saved():
    saved = []
    index = row_index(torch.tensor([0, 1, 0]), 2)
    x = torch.randn(2, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gather_rows(x, index)
    assert all(t.dtype == torch.int64 for t in saved)


def test_the_operator_and_its_compiled_form():
    index = row_index(torch.tensor([0, 2, 2, 1]), 3)
    x = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(gather_rows_forward, (x, *index))
    compiled = torch.compile(gather_rows, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(4, 5)
    assert_bitwise(*(results(lambda t, f=f: f(t, index), x, upstream) for f in (gather_rows, compiled)))
    with pytest.raises(ValueError, match="an index of 3 rows does not fit"):
        gather_rows(x[:2], index)


@pytest.mark.parametrize("compiled", [False, True])
def test_taking_rows_and_putting_them_back(compiled):
    rows = torch.tensor([1, 4, 5])

    def both(x):
        return put_rows(take_rows(x, rows) * 2, rows, 7)

    function = torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both
    x, upstream = torch.randn(7, 2, 3, requires_grad=True), torch.randn(7, 2, 3)
    kept = torch.zeros(7, 1, 1)
    kept[rows] = 2
    for a, b in zip(results(function, x, upstream), (x.detach() * kept, upstream * kept)):
        assert torch.equal(a, b)
