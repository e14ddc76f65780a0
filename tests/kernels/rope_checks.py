"""The Triton kernels of the rotary embedding and of gathered rows against float64; `test_triton.py` runs this file."""

from __future__ import annotations

import pytest
import torch

import pite_kernels.rope
import pite_kernels.rows
from pite_kernels import reference, rope_qkv, rope_tables, row_index
from pite_kernels.gpu import rope, rows
from tests.kernels.helpers import assert_as_accurate, assert_bitwise
from tests.kernels.triton_checks import DEVICE, DTYPES, assert_repeatable


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width", "copies"), [(40, 48, 1), (7, 1500, 9), (3, 16, 70), (5, 8, 0)])
def test_sum_over_copies(dtype, count, width, copies):
    """Row i has i % (copies + 1) copies, in any order."""
    g = torch.Generator().manual_seed(0)
    order = torch.arange(count).repeat_interleave(torch.arange(count) % (copies + 1))
    index = row_index(order[torch.randperm(len(order), generator=g)], count)
    grad = torch.randn(len(order), width, generator=g).to(DEVICE, dtype)
    lists = [t.to(DEVICE) for t in index[1:]]
    wide = torch.full((count, 2, width), 7.0, dtype=dtype, device=DEVICE)
    rows.sum_rows(grad, *lists, wide[:, 1])
    again = torch.empty_like(wide[:, 1])
    rows.sum_rows(grad, *lists, again)
    assert torch.equal(again, wide[:, 1]) and (wide[:, 0] == 7).all()
    truth = torch.zeros(count, width, dtype=torch.float64).index_add_(0, index.rows, grad.double().cpu())
    plain = torch.zeros(count, width, dtype=dtype).index_add_(0, index.rows, grad.cpu())
    assert_as_accurate([again.cpu()] * 2, [plain] * 2, [truth] * 2)


def rope_results(qkv, cos, sin, width, key_heads, upstream, index=None) -> list[torch.Tensor]:
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        # `leaf * 1` plays the projection: rope_qkv overwrites its output.
        parts = rope_qkv(leaf * 1, cos, sin, head_dim=width, key_heads=key_heads, kv_rows=index)
        return [*(t.detach() for t in parts), torch.autograd.grad(parts, leaf, upstream)[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "key_heads", "width"),
    [(37, 4, 4, 16), (130, 9, 3, 64), (5, 2, 1, 40), (1, 1, 1, 128), (0, 2, 2, 8)],
)
def test_rope(dtype, gathered, tokens, heads, key_heads, width, monkeypatch):
    """In place; or with rows of k and v that are gathered, the first ones often and some never."""
    for module in (pite_kernels.rope, pite_kernels.rows):
        monkeypatch.setattr(module, "uses_triton", lambda tensor: tensor.dtype != torch.float64)
    order = torch.tensor([*range(tokens // 4)] * 20 + [*range(tokens // 2)], dtype=torch.int64)
    index = pite_kernels.RowIndex(*(t.to(DEVICE) for t in row_index(order, tokens))) if gathered else None
    copied = len(order) if gathered else tokens
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    qkv = normal(tokens, (heads + 2 * key_heads) * width)
    # Attention's backward may give such gradients: one is strided, one has a last dimension that is not dense.
    upstream = (
        normal(tokens, 2 * heads, width)[:, ::2],
        normal(copied, width, key_heads).transpose(1, 2),
        normal(copied, key_heads, width),
    )
    tables = rope_tables(torch.arange(tokens) * 7 % 100, width, dtype=dtype)
    inputs = (qkv, *(t.to(DEVICE) for t in tables))
    ours = rope_results(*inputs, width, key_heads, upstream, index)
    assert_repeatable(ours, lambda: rope_results(*inputs, width, key_heads, upstream, index))

    def plain(to: torch.dtype) -> list[torch.Tensor]:
        with torch.enable_grad():
            leaf = qkv.to(to).requires_grad_()
            q, k, v = leaf.unflatten(-1, (-1, width)).split([heads, key_heads, key_heads], 1)
            parts = *reference.apply_rope(q, k, *(t.to(to) for t in inputs[1:])), v
            if index is not None:
                parts = parts[0], parts[1][index.rows], parts[2][index.rows]
            return [*(t.detach() for t in parts), torch.autograd.grad(parts, leaf, [u.to(to) for u in upstream])[0]]

    assert_as_accurate(ours, plain(dtype), plain(torch.float64))


def test_rope_of_strided_tables_and_of_an_output_that_was_saved_for_backward(monkeypatch):
    monkeypatch.setattr(pite_kernels.rope, "uses_triton", lambda tensor: True)
    qkv = torch.randn(6, 3 * 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cos, sin = (t.to(DEVICE) for t in rope_tables(torch.arange(6), 16))
    strided_tables = cos.t().contiguous().t(), torch.stack([sin, sin], 1)[:, 0]
    dense, strided = (
        rope_qkv(qkv.clone(), *tables, head_dim=16, key_heads=1) for tables in ((cos, sin), strided_tables)
    )
    assert_bitwise(dense, strided)
    with torch.enable_grad():
        leaf = qkv.requires_grad_()
        q, *_ = rope_qkv(leaf.exp(), cos, sin, head_dim=16, key_heads=1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            q.sum().backward()


def test_rope_in_place_addresses_far_rows_in_64_bits():
    torch.use_deterministic_algorithms(False)  # would fill all of the memory
    stride = (1 << 31) // 3 + 16
    try:
        far = torch.empty(4 * stride, dtype=torch.float16, device=DEVICE).as_strided((4, 2, 32), (stride, 32, 1))
    except RuntimeError:
        pytest.skip("not enough memory for a tensor of more than 2^31 elements")
    near = torch.randn(4, 2, 32).to(far)
    far.copy_(near)
    cos, sin = (t.to(DEVICE) for t in rope_tables(torch.arange(4), 32, dtype=torch.float16))
    out = torch.empty_like(near)
    rope.rotate(near, out, cos, sin, back=False)
    rope.rotate(far, far, cos, sin, back=False)
    assert torch.equal(far, out) and not torch.equal(out, near)
    rope.rotate(far, far, cos, sin, back=True)
    torch.testing.assert_close(far, near, rtol=0, atol=4e-3)
