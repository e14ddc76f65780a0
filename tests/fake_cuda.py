"""The CUDA code without a GPU: every line of Python runs on fake tensors that say they are on CUDA, and launches nothing.

What it allocates is counted tensor by tensor. Only attention has a stand-in, which makes what flash-attn makes.
"""

from __future__ import annotations

import importlib
import pkgutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import attention

BLOCK = 512
"""CUDA's caching allocator hands out multiples of it, in bytes."""


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators make while this is on, and of those handed to `own`: now, and at most.

    Our own operators run their real bodies, so that what these make is counted too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._given: set[int] = set()
        self._bodies = operator_bodies()
        self.now = self.peak = 0

    def own(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += self._alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._given |= {t.untyped_storage()._cdata for t in tensors((args, kwargs))} - self._alive.keys()
        if func in self._bodies:
            with self:
                out = self._bodies[func](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            if tensor.untyped_storage()._cdata not in self._given:
                self.own(tensor)
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def operator_bodies() -> dict[Any, Callable[..., Any]]:
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__) if m.name != "_C"]
    modules = [importlib.import_module(f"kernels.{name}") for name in names]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, CustomOpDef)]
    return {op._opoverload: op._init_fn for op in found}


class _Flash(torch.autograd.Function):
    """Allocates what flash-attn 2 does: the output and its log-sum-exp; in backward, dq once more in float32."""

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
        return *(torch.empty_like(t) for t in (q, k, v)), *[None] * 4


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Within it tensors are fake and say `is_cuda`; Triton launches, liger-kernel's too, do nothing."""
    from triton.runtime.jit import JITFunction

    # Their device stays the CPU: autograd's engine has no other where torch is built without CUDA.
    monkeypatch.setattr(FakeTensor, "is_cuda", True)
    monkeypatch.setattr(JITFunction, "run", lambda *arguments, **options: None)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "_assert_async", lambda *arguments: None)
    monkeypatch.setitem(attention._loaded, "stand-in", _Flash.apply)
    monkeypatch.setattr(attention, "choose_backend", lambda *arguments: "stand-in")
    with FakeTensorMode() as mode:
        yield mode
