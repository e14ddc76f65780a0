"""RMSNorm, rotary embedding and SwiGLU equal transformers' Llama, packed."""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from pite_kernels import (
    apply_rope,
    elementwise,
    reference,
    rms_norm,
    rope_kv,
    rope_q,
    rope_qkv,
    rope_tables,
    row_index,
    swiglu,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_llama(dtype):
    norm = LlamaRMSNorm(24, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 24, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, norm.weight, eps=1e-5), norm(x))


def test_rms_norm_with_residual():
    x, residual, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 8), (5, 8), (8,)))
    normed, total = rms_norm(x, weight, eps=1e-6, residual=residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, reference.rms_norm(x + residual, weight, eps=1e-6))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(t[0], t[1], residual=t[2]), (x, weight, residual))


def test_rope_equals_llama_with_positions_that_restart():
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3])
    q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    ours = apply_rope(q, k, *rope_tables(positions.int(), 16, theta=500.0))
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b[0].transpose(0, 1))
    with pytest.raises(ValueError, match="even"):
        rope_tables(positions, 15)


def test_rope_of_three_axes_equals_qwen():
    """M-RoPE in consecutive sections (Qwen2-VL, Qwen2.5-VL) and interleaved (Qwen3-VL)."""
    positions = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    for config_class, rotary, interleaved in (
        (Qwen2VLTextConfig, Qwen2VLRotaryEmbedding, False),
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, True),
    ):
        rope = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [8, 4, 4]}
        config = config_class(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=rope)
        expected = rotary(config)(torch.zeros(1), positions[:, None])
        ours = rope_tables(positions, 32, theta=500.0, sections=[8, 4, 4], interleaved=interleaved)
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, b[0])
    same = rope_tables(positions[:1].expand(3, -1), 32, sections=[8, 4, 4])
    assert all(torch.equal(a, b) for a, b in zip(same, rope_tables(positions[0], 32)))
    with pytest.raises(ValueError, match="add up to 16"):
        rope_tables(positions, 32, sections=[8, 4, 5])
    with pytest.raises(ValueError, match="add up to 16"):
        rope_tables(positions, 32, sections=[24, -4, -4])
    with pytest.raises(ValueError, match="the first must be the largest"):
        rope_tables(positions, 32, sections=[4, 6, 6], interleaved=True)
    with pytest.raises(ValueError, match=r"must be \(3, T\)"):
        rope_tables(positions[0], 32, sections=[8, 4, 4])
    with pytest.raises(ValueError, match=r"must be \(T,\)"):
        rope_tables(positions, 32)


@pytest.mark.parametrize("gathered", [False, True])
def test_norms_of_queries_and_keys_equal_qwen3(gathered):
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(9, (4 + 2 * 2) * 16, generator=g, dtype=torch.float64, requires_grad=True)
    norms = [Qwen3RMSNorm(16, eps=1e-5).double() for _ in range(2)]
    for norm in norms:
        norm.weight.data = torch.rand(16, generator=g, dtype=torch.float64)
    tables = rope_tables(torch.arange(9), 16, dtype=torch.float64)
    index = row_index(torch.tensor([0, 1, 1, 8, 2, 0]), 9) if gathered else None
    weights = norms[0].weight, norms[1].weight
    ours = rope_qkv(qkv, *tables, head_dim=16, key_heads=2, norms=weights, eps=1e-5, kv_rows=index)
    q, k, v = (t.unflatten(-1, (-1, 16)) for t in qkv.split([64, 32, 32], -1))
    q, k = apply_rope(norms[0](q), norms[1](k), *tables)
    expected = (q, k[index.rows], v[index.rows]) if index else (q, k, v)
    leaves = qkv, *weights
    rounding = {"rtol": 1e-4, "atol": 1e-5}  # transformers computes this norm in float32
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, **rounding)
    gradients = (torch.autograd.grad([t.square().sum() for t in parts], leaves) for parts in (ours, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, **rounding)
    with pytest.raises(ValueError, match="two weights of 16"):
        rope_qkv(qkv, *tables, head_dim=16, key_heads=2, norms=(weights[0], weights[1][:8]))


def test_norms_have_the_dtype_of_the_projection():
    g = torch.Generator().manual_seed(3)
    qkv, norms = torch.randn(5, 64, generator=g).bfloat16(), tuple(torch.rand(2, 16, generator=g))
    tables = rope_tables(torch.arange(5), 16, dtype=torch.bfloat16)
    half = tuple(norm.bfloat16() for norm in norms)
    ours, same = (rope_qkv(qkv, *tables, head_dim=16, key_heads=1, norms=each) for each in (norms, half))
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(ours, same))


def test_rope_of_a_fused_projection_equals_rope_of_its_parts():
    qkv, tables = torch.randn(9, (4 + 2 * 2) * 16), rope_tables(torch.arange(9), 16)
    q, k, v = (t.unflatten(-1, (-1, 16)) for t in qkv.split([64, 32, 32], -1))
    ours = rope_qkv(qkv, *tables, head_dim=16, key_heads=2)
    for a, b in zip(ours, (*apply_rope(q, k, *tables), v)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    index = row_index(torch.tensor([0, 1, 1, 8, 2, 0]), 9)
    gathered = rope_qkv(qkv, *tables, head_dim=16, key_heads=2, kv_rows=index)
    parts = rope_q(qkv[:, :64], *tables, head_dim=16), *rope_kv(qkv[:, 64:], *tables, head_dim=16, kv_rows=index)
    for a, b, expected in zip(gathered, parts, (ours[0], ours[1][index.rows], ours[2][index.rows])):
        assert torch.equal(a, expected) and torch.equal(b, expected)
    for options in (
        {"head_dim": 15, "key_heads": 2},
        {"head_dim": 16, "key_heads": 3},
        {"head_dim": 16, "key_heads": 4},
    ):
        with pytest.raises(ValueError, match="does not hold q, k, v"):
            rope_qkv(qkv, *tables, **options)
    with pytest.raises(ValueError, match="must be 9 x 16"):
        rope_qkv(qkv, tables[0][:8], tables[1], head_dim=16, key_heads=2)


def test_swiglu_from_two_tensors_or_one():
    gate, up = torch.randn(6, 10), torch.randn(6, 10)
    torch.testing.assert_close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(swiglu(torch.cat([gate, up], -1)), swiglu(gate, up))


@pytest.mark.parametrize("missing", [[], ["LigerFusedGateUpSiLUMulFunction"]], ids=["current", "0.8.1"])
def test_a_liger_kernel_that_is_too_old_is_not_used_at_all(monkeypatch, caplog, missing):
    fake = ModuleType("liger_kernel.ops")
    for name in set(elementwise._LIGER) - set(missing):
        setattr(fake, name, object)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", fake)
    # __wrapped__: without the cache.
    assert elementwise._liger.__wrapped__() is (None if missing else fake)
    assert caplog.messages == [
        f"pite_kernels: this liger-kernel has no {name}; install 0.8.2 or later. PyTorch is used instead."
        for name in missing
    ]


def test_a_missing_liger_kernel_is_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    assert elementwise._liger.__wrapped__() is None
    assert "liger-kernel is not installed" in caplog.text


def test_every_liger_function_in_use_is_checked_for():
    source = inspect.getsource(elementwise)
    assert set(re.findall(r"liger\.(Liger\w+)", source)) == set(elementwise._LIGER)


LIGER_CALLS = {
    "rms_norm": lambda x: rms_norm(x, x[0]),
    "rms_norm with a residual": lambda x: rms_norm(x, x[0], residual=x),
    "swiglu": swiglu,
    "swiglu of two": lambda x: swiglu(x, x),
    "apply_rope": lambda x: apply_rope(x.unflatten(1, (2, 16)), x.unflatten(1, (2, 16)), x[:, :16], x[:, :16]),
}


@pytest.mark.parametrize("name", LIGER_CALLS)
def test_liger_is_launched_on_the_device_of_its_input(name, monkeypatch):
    """With tensors on cuda:1 and cuda:0 current, as under device_map="auto", Triton would launch on cuda:0."""
    pytest.importorskip("liger_kernel", reason="liger-kernel exists for Linux only")
    from triton.runtime.jit import JITFunction

    from bench.machine_code.launches import recorded_launches

    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    with recorded_launches() as launches:
        record = JITFunction.run
        guarded = []

        def run(kernel, *arguments, **options):
            guarded.append(bool(current))
            record(kernel, *arguments, **options)

        monkeypatch.setattr(JITFunction, "run", run)
        monkeypatch.setattr(torch.cuda, "device_of", device_of)
        LIGER_CALLS[name](torch.empty(6, 32))
    assert launches and guarded and all(guarded)
