"""Packed attention through the mask and shape code of the real xformers; its kernels need a GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from pite_kernels import packed_attention, reference
from pite_kernels.attention import backends
from tests.kernels.test_attention import make, make_shared


@pytest.fixture(scope="module")
def fmha():
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns that its CUDA library does not load
    return pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed")


@pytest.fixture
def kernel(fmha, monkeypatch):
    """The flash-attn operator of xformers, computed in PyTorch from the arguments that it would pass on."""
    from xformers.ops.fmha import common, flash

    inputs: list[common.Inputs] = []

    class OnCPU(common.AttentionFwOpBase):
        NAME = "cpu"

        @classmethod
        def apply(cls, inp, needs_gradient):
            inputs.append(inp)
            causal = isinstance(inp.attn_bias, fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask)
            inp, bounds, longest, key_bounds, longest_key, used = flash._convert_input_format(inp, supports_mqa=True)
            assert used is None
            keys = {"cu_seqlens_kv": key_bounds, "max_seqlen_kv": longest_key}
            q, k, v = inp.query, inp.key, inp.value
            out = reference.packed_attention(q, k, v, bounds, longest, **keys, causal=causal, scale=inp.scale_float)
            return out[None], None

    monkeypatch.setattr(fmha, "_dispatch_fw", lambda *arguments: OnCPU)
    monkeypatch.setattr(backends, "_loaded", {})
    return inputs


def detached(inputs):
    return [t.detach() if torch.is_tensor(t) else t for t in inputs]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_masks_and_shapes(kernel, key_heads, causal):
    inputs, options = detached(make([33, 1, 70], key_heads=key_heads)), {"causal": causal, "scale": 0.3}
    out = packed_attention(*inputs, **options, backend="xformers")
    torch.testing.assert_close(out, reference.packed_attention(*inputs, **options))


@pytest.mark.parametrize("causal", [True, False])
def test_shared_prefixes(kernel, causal):
    *inputs, shared = detached(make_shared(key_heads=2))
    out = packed_attention(*inputs, **shared, causal=causal, backend="xformers")
    torch.testing.assert_close(out, reference.packed_attention(*inputs, **shared, causal=causal))


@pytest.mark.parametrize("causal", [True, False])
def test_its_cuda_kernels_refuse_nothing_but_the_cpu(fmha, kernel, causal):
    """xformers' own list of reasons, forward and backward: this device, and the library that does not load on it."""
    packed_attention(*detached(make([9, 16], torch.float16, key_heads=2)), causal=causal, backend="xformers")
    (inputs,) = kernel
    torch.use_deterministic_algorithms(False)  # its backward pass is not; tests/kernels/conftest.py sets the mode
    for operator in (fmha.flash.FwOp, fmha.flash.BwOp):
        reasons = operator.not_supported_reasons(inputs)
        assert [r for r in reasons if not r.startswith(("device=cpu", "operator wasn't built"))] == []
        assert any(r.startswith("device=cpu") for r in reasons)
