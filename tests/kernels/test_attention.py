"""Packed attention: every document attends only to itself and to the prefix that it shares."""

from __future__ import annotations

import pytest
import torch

from pite_kernels import packed_attention, reference, row_index
from pite_kernels.attention import backends, sdpa
from tests.kernels.helpers import ROUNDING, assert_as_accurate, assert_bitwise
from tests.operators import Operators

LENGTHS = [[17], [5, 5, 5, 5], [40, 3, 0, 38, 1, 7, 7, 30], [0, 4, 0], [0]]


def make(lengths, dtype=torch.float32, heads=4, key_heads=4, width=8):
    g = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (
        torch.randn(tokens, h, width, generator=g).to(dtype).requires_grad_() for h in (heads, key_heads, key_heads)
    )
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return q, k, v, bounds, max(lengths)


def results(q, k, v, bounds, longest, function=packed_attention, **options):
    out = function(q, k, v, bounds, longest, **options)
    upstream = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [(d, n) for d in (torch.float64, torch.float32, torch.bfloat16) for n in LENGTHS] + [(torch.float16, LENGTHS[2])],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_against_float64(dtype, lengths, causal, key_heads):
    q, k, v, *rest = make(lengths, dtype, key_heads=key_heads)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    ours, plain, truth = (
        results(*tensors, *rest, function=f, causal=causal, scale=0.3)
        for tensors, f in (
            ((q, k, v), packed_attention),
            ((q, k, v), reference.packed_attention),
            (exact, reference.packed_attention),
        )
    )
    assert_as_accurate(ours, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_document_of_one_token_has_no_gradient_of_query_and_key(dtype):
    """The output is the value. Query and key get the difference of two equal terms: at most a rounding of these terms."""
    q, k, v, *rest = make([1] * 9, dtype)
    out, of_query, of_key, of_value = results(q, k, v, *rest, scale=0.3)
    upstream = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    assert torch.equal(out, v) and torch.equal(of_value, upstream)
    terms = 0.3 * (upstream.abs() * v.abs()).sum(-1, keepdim=True).double()
    for gradient, other in ((of_query, k), (of_key, q)):
        assert (gradient.double().abs() <= ROUNDING[dtype] * terms * other.abs()).all()


def make_shared(dtype=torch.float32, heads=4, key_heads=4, width=8, lengths=((0, 7), (0, 9), (7, 30), (0, 2), (4, 1))):
    """A prefix of 7 rows, and documents of own rows after the prefix' first rows: (rows of the prefix, own rows)."""
    own = [rows for _, rows in lengths]
    q, k, v, bounds, longest = make(own, dtype, heads, key_heads, width)
    starts = bounds.tolist()
    keys = [[*range(shared), *range(a, a + n)] for (shared, n), a in zip(lengths, starts)]
    ends = torch.tensor([0, *torch.tensor([len(k) for k in keys]).cumsum(0)], dtype=torch.int32)
    index = row_index(torch.tensor([row for rows in keys for row in rows]), len(k))
    shared = {"kv_rows": index, "cu_seqlens_kv": ends, "max_seqlen_kv": max(map(len, keys))}
    return q, k, v, bounds, longest, shared


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("lengths", [((0, 7), (7, 1), (7, 30), (7, 29)), ((0, 40), (40, 5), (16, 1), (0, 3), (9, 70))])
def test_shared_keys_against_float64(dtype, causal, key_heads, lengths):
    q, k, v, *rest, shared = make_shared(dtype, key_heads=key_heads, lengths=lengths)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    ours, plain, truth = (
        results(*tensors, *rest, function=f, causal=causal, scale=0.3, **shared)
        for tensors, f in (
            ((q, k, v), packed_attention),
            ((q, k, v), reference.packed_attention),
            (exact, reference.packed_attention),
        )
    )
    assert_as_accurate(ours, plain, truth)


def test_a_shared_prefix_gives_what_its_copies_give():
    q, k, v, bounds, longest, shared = make_shared(torch.float64, lengths=((0, 7), (7, 5), (7, 8)))
    ours = results(q, k, v, bounds, longest, **shared)
    rows = torch.tensor([*range(7), *range(7), *range(7, 12), *range(7), *range(12, 20)])
    copies = [t[rows] for t in (q, k, v)]
    out = packed_attention(*copies, torch.tensor([0, 7, 19, 34], dtype=torch.int32), 15)
    own = out[torch.tensor([*range(7), *range(14, 19), *range(26, 34)])]
    upstream = torch.linspace(-1, 1, own.numel()).view_as(own).double()
    for a, b in zip(ours, [own, *torch.autograd.grad(own, (q, k, v), upstream)]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_without_shared_rows_nothing_is_added():
    """A back end's own operators, and no other: q, k and v reach it as they are."""
    inputs = make([6, 6])
    backends._loaded["identity"] = lambda q, k, v, *rest: q
    with Operators() as operators:
        out = packed_attention(*inputs, backend="identity")
    del backends._loaded["identity"]
    assert out is inputs[0] and operators.names == []


def test_keys_that_are_gathered_already():
    q, k, v, bounds, longest, shared = make_shared()
    index = shared.pop("kv_rows")
    gathered = packed_attention(q, k[index.rows], v[index.rows], bounds, longest, **shared)
    assert torch.equal(gathered, packed_attention(q, k, v, bounds, longest, kv_rows=index, **shared))


def test_views_of_one_projection():
    """q, k and v as strided slices of a fused projection's output; their gradients are summed into one tensor."""
    fused = torch.randn(30, 6, 8, requires_grad=True)
    bounds = torch.tensor([0, 11, 12, 30], dtype=torch.int32)
    views, copies = (
        [part if keep else part.contiguous() for part in fused.split([4, 1, 1], 1)] for keep in (True, False)
    )
    outs = packed_attention(*views, bounds, 18), reference.packed_attention(*copies, bounds, 18)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), fused)[0] for out in outs))


def test_documents_do_not_attend_to_each_other():
    q, k, v, bounds, longest = make([9, 11, 10])
    before = packed_attention(q, k, v, bounds, longest)
    with torch.no_grad():
        for t in (q, k, v):
            t[9:20] = 100.0
    after = packed_attention(q, k, v, bounds, longest)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[20:], after[20:])


def test_similar_lengths_share_a_call():
    bounds = (0, 9, 20, 30, 130)
    groups, order = sdpa._plan(bounds, bounds, width=64, causal=True)
    assert [(group.documents, len(group.queries)) for group in groups] == [(1, 100), (3, 33)]
    assert order is not None
    same, unchanged = sdpa._plan((0, 10, 20, 30), (0, 10, 20, 30), width=10**9, causal=False)
    assert len(same) == 1 and same[0].real is None and unchanged is None


def test_repeats_bitwise():
    inputs = make([33, 2, 30, 28, 5])
    assert_bitwise(results(*inputs), results(*inputs))


def test_invalid_arguments_raise():
    q, k, v, bounds, longest = make([9, 11])
    for bad in (bounds[1:], bounds[:-1], torch.tensor([0, 15, 9, 20], dtype=torch.int32)):
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            packed_attention(q, k, v, bad, longest)
    with pytest.raises(ValueError, match="int32"):
        packed_attention(q, k, v, bounds.long(), longest)
    with pytest.raises(ValueError, match="do not fit"):
        packed_attention(q, k[:, :3], v[:, :3], bounds, longest)
    with pytest.raises(ValueError, match="do not fit"):
        packed_attention(q, k[:, :0], v[:, :0], bounds, longest)
    with pytest.raises(ValueError, match="one dtype"):
        packed_attention(q, k.bfloat16(), v.bfloat16(), bounds, longest)
    shared = make_shared()
    with pytest.raises(ValueError, match="kv_rows needs cu_seqlens_kv"):
        packed_attention(*shared[:5], kv_rows=shared[5]["kv_rows"])
    with pytest.raises(ValueError, match="give both"):
        packed_attention(q, k, v, bounds, longest, cu_seqlens_kv=bounds)
    with pytest.raises(ValueError, match="fewer keys than queries"):
        fewer = torch.tensor([0, 8, 20], dtype=torch.int32)
        packed_attention(q, k, v, bounds, longest, cu_seqlens_kv=fewer, max_seqlen_kv=12)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        packed_attention(q, k, v, bounds, longest, backend="fast")
