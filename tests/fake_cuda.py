"""Runs the CUDA code without a GPU: all Python code runs on fake tensors with is_cuda == True.

Each allocated tensor can be counted, and each Triton launch is recorded, so that it can be compiled. Only attention is
replaced, by a function that allocates what flash-attn allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.machine_code.launches import Launch, recorded_launches
from pite_kernels import attention
from pite_kernels.attention import backends


class _Flash(torch.autograd.Function):
    """Allocates what flash-attn 2 allocates: the output and its log-sum-exp; in backward, also dq in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, lse, cu_seqlens = ctx.saved_tensors
        _wide = q.new_empty((len(q) + 128 * len(cu_seqlens), *q.shape[1:]), dtype=torch.float32)
        _sums = torch.empty_like(lse)
        return *(torch.empty_like(t) for t in (q, k, v)), *[None] * 6


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Launch, None]]:
    """Context with fake CUDA tensors; Triton launches, also liger-kernel's, are keys of the yielded dict."""
    monkeypatch.setitem(backends._loaded, "fake flash-attn", _Flash.apply)
    monkeypatch.setattr(attention, "choose_backend", lambda *arguments: "fake flash-attn")
    with recorded_launches() as launches:
        yield launches
