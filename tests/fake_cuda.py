"""Runs the CUDA code without a GPU: all Python code runs on fake tensors with is_cuda == True.

Each allocated tensor can be counted, and each Triton launch is recorded, so that it can be compiled. Only attention is
replaced, by a function that allocates what flash-attn allocates.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pite_kernels import attention


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


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class Launch:
    """A program that Triton would compile: a kernel with types, constants and arguments divisible by 16."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
        """The specialization that Triton compiles for a call. Raises TypeError if the arguments do not fit."""
        bound = inspect.signature(kernel.fn).bind(
            *arguments, **{name: options.pop(name) for name in kernel.arg_names if name in options}
        )
        bound.apply_defaults()
        types, constants, divisible = {}, {}, []
        for i, parameter in enumerate(kernel.params):
            value = bound.arguments[parameter.name]
            number = type(value) is int and not parameter.is_constexpr
            if parameter.is_constexpr or value is None or (number and value == 1):
                types[parameter.name] = "constexpr"
                constants[parameter.name] = getattr(value, "value", value)
                continue
            if isinstance(value, Tensor):
                types[parameter.name] = POINTERS[value.dtype]
            else:
                types[parameter.name] = {bool: "i1", int: "i32", float: "fp32"}[type(value)]
            # The allocator aligns its blocks, so a view is aligned if its offset is divisible by 16 bytes.
            at = value.storage_offset() * value.itemsize if isinstance(value, Tensor) else value
            if type(value) is not float and at % 16 == 0:
                divisible.append(i)
        return Launch(
            kernel, tuple(types.items()), tuple(constants.items()), tuple(divisible), tuple(sorted(options.items()))
        )


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Launch]]:
    """Context with fake CUDA tensors; Triton launches, also liger-kernel's, are added to the yielded set."""
    from triton.runtime.jit import JITFunction

    launches: set[Launch] = set()

    def record(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        assert all(type(n) is int and n > 0 for n in grid)
        launches.add(Launch.of(kernel, arguments, options))

    # The device stays the CPU, because autograd's engine supports no other if torch is built without CUDA.
    monkeypatch.setattr(FakeTensor, "is_cuda", True)
    monkeypatch.setattr(JITFunction, "run", record)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "_assert_async", lambda *arguments: None)
    monkeypatch.setitem(attention._loaded, "fake flash-attn", _Flash.apply)
    monkeypatch.setattr(attention, "choose_backend", lambda *arguments: "fake flash-attn")
    with FakeTensorMode():
        yield launches
