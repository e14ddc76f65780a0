"""Packed attention: every document attends to itself alone, however the documents are batched behind the call."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kernels import attention, packed_attention, reference
from tests.kernels.helpers import assert_as_accurate, assert_bitwise

LENGTHS = [[17], [5, 5, 5, 5], [40, 3, 0, 38, 1, 7, 7, 30], [1] * 9, [0, 4, 0], [0]]


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
    # Where every document is one token the gradient of q is zero, and float16's noise about it has no scale.
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


def test_views_of_one_projection():
    """q, k and v as slices of a fused projection's output: strided, and their gradients meet in one tensor."""
    fused = torch.randn(30, 6, 8, requires_grad=True)
    bounds = torch.tensor([0, 11, 12, 30], dtype=torch.int32)
    views, copies = (
        [part if keep else part.contiguous() for part in fused.split([4, 1, 1], 1)] for keep in (True, False)
    )
    outs = packed_attention(*views, bounds, 18), reference.packed_attention(*copies, bounds, 18)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), fused)[0] for out in outs))


def test_documents_do_not_see_each_other():
    q, k, v, bounds, longest = make([9, 11, 10])
    before = packed_attention(q, k, v, bounds, longest)
    with torch.no_grad():
        for t in (q, k, v):
            t[9:20] = 100.0
    after = packed_attention(q, k, v, bounds, longest)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[20:], after[20:])


def test_similar_lengths_share_a_call():
    groups, order = attention._plan((0, 9, 20, 30, 130), width=64, causal=True)
    assert [(length, len(slots)) for slots, length, _ in groups] == [(100, 100), (11, 33)]
    assert order is not None
    same, unchanged = attention._plan((0, 10, 20, 30), width=10**9, causal=False)
    assert len(same) == 1 and same[0][2] is None and unchanged is None


def test_repeats_bitwise():
    inputs = make([33, 2, 30, 28, 5])
    assert_bitwise(results(*inputs), results(*inputs))


def test_refusals():
    q, k, v, bounds, longest = make([9, 11])
    for bad in (bounds[1:], bounds[:-1], torch.tensor([0, 15, 9, 20], dtype=torch.int32)):
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            packed_attention(q, k, v, bad, longest)
    with pytest.raises(ValueError, match="int32"):
        packed_attention(q, k, v, bounds.long(), longest)
    with pytest.raises(ValueError, match="do not fit"):
        packed_attention(q, k[:, :3], v[:, :3], bounds, longest)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        packed_attention(q, k, v, bounds, longest, backend="fast")


def test_a_backend_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(attention, "_loaded", {})
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
    with pytest.raises(ValueError, match="'xformers' is not usable here"):
        packed_attention(*make([3]), backend="xformers")


def flash(recorded):
    def flash_attn_varlen_func(q, k, v, **options):
        recorded.update(options)
        bounds, scale = options["cu_seqlens_q"], options["softmax_scale"]
        out = reference.packed_attention(
            q, k, v, bounds, options["max_seqlen_q"], causal=options["causal"], scale=scale
        )
        return out, None

    return ModuleType("flash_attn_interface"), flash_attn_varlen_func


def old_varlen(recorded):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        recorded.update(is_causal=is_causal)
        return reference.packed_attention(query, key, value, cu_seq_q, max_q, causal=is_causal)

    return varlen_attn


def new_varlen(recorded):
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        recorded.update(window_size=window_size, enable_gqa=enable_gqa)
        assert enable_gqa or query.shape[1] == key.shape[1]
        return reference.packed_attention(
            query, key, value, cu_seq_q, max_q, causal=window_size == (-1, 0), scale=scale
        )

    return varlen_attn


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("which", ["flash_attn", "varlen_attn, old", "varlen_attn, new", "xformers"])
def test_adapters_speak_each_backends_dialect(which, causal, monkeypatch):
    """The back ends need a GPU; their call signatures do not. Each stand-in has the real one's parameters."""
    recorded: dict[str, object] = {}
    if which == "flash_attn":
        module, function = flash(recorded)
        module.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    elif which == "xformers":
        infos = lambda name: lambda q_seqinfo, k_seqinfo: SimpleNamespace(kind=name, info=q_seqinfo)  # noqa: E731
        bias = ModuleType("attn_bias")
        bias._SeqLenInfo = lambda **options: SimpleNamespace(**options)
        bias.BlockDiagonalCausalMask, bias.BlockDiagonalMask = infos("causal"), infos("full")
        fmha = ModuleType("fmha")

        def attend(q, k, v, attn_bias, scale):
            q, k, v = (t[0].flatten(1, 2) for t in (q, k, v))
            info, kind = attn_bias.info, attn_bias.kind
            out = reference.packed_attention(
                q, k, v, info.seqstart, info.max_seqlen, causal=kind == "causal", scale=scale
            )
            return out.unflatten(1, (2, -1))[None]

        fmha.memory_efficient_attention = attend
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)
    else:
        stand_in = ModuleType("varlen")
        stand_in.varlen_attn = (old_varlen if which.endswith("old") else new_varlen)(recorded)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    monkeypatch.setattr(attention, "_loaded", {})
    inputs = make([9, 14, 3], key_heads=2)
    ours = results(*inputs, backend=which.split(",")[0], causal=causal, scale=0.3)
    plain = results(*inputs, function=reference.packed_attention, causal=causal, scale=0.3)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)
    assert recorded.get("causal", causal) == causal


def test_the_cpu_always_has_a_backend():
    assert attention.choose_backend("cpu", torch.float32) == "sdpa"
    assert attention.choose_backend("cuda", torch.float32) == "sdpa"


def test_a_loaded_backend_compiles_without_a_break(monkeypatch):
    def attend(q, k, v, cu_seqlens, max_seqlen, causal, scale):
        return q * scale + k + v * max_seqlen

    monkeypatch.setattr(attention, "_loaded", {"varlen_attn": attend})
    monkeypatch.setattr(attention, "_chosen", {("cpu", torch.float32): "varlen_attn"})
    inputs = make([9, 14, 3])
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    assert_bitwise(results(*inputs), results(*inputs, function=compiled))


def test_cuda_takes_the_first_backend_that_imports(monkeypatch, caplog):
    monkeypatch.setattr(attention, "_chosen", {})
    monkeypatch.setattr(attention, "_loaded", {"xformers": reference.packed_attention})
    for module in ("flash_attn.cute", "flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level("INFO"):
        assert attention.choose_backend("cuda", torch.bfloat16) == "xformers"
        assert attention.choose_backend("cuda", torch.bfloat16) == "xformers"
    assert caplog.messages == ["packed_attention uses xformers"]
