"""Records Triton launches instead of executing them, in the specialisation that Triton would compile for the call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

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
            general = parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (number and value == 1 and not general):
                types[parameter.name] = "constexpr"
                constants[parameter.name] = getattr(value, "value", value)
                continue
            if isinstance(value, Tensor):
                types[parameter.name] = POINTERS[value.dtype]
            else:
                types[parameter.name] = {bool: "i1", int: "i32", float: "fp32"}[type(value)]
            # The allocator aligns its blocks, so a view is aligned if its offset is divisible by 16 bytes.
            at = value.storage_offset() * value.itemsize if isinstance(value, Tensor) else value
            if type(value) is not float and at % 16 == 0 and not general:
                divisible.append(i)
        return Launch(
            kernel, tuple(types.items()), tuple(constants.items()), tuple(divisible), tuple(sorted(options.items()))
        )

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def constant(self, *names: str) -> tuple[Any, ...]:
        constants = dict(self.constants)
        return tuple(constants[name] for name in names)


@contextmanager
def recorded_launches(processors: int = 132) -> Iterator[dict[Launch, None]]:
    """Context in which tensors are fake, pass for CUDA's, and each Triton launch is a key of the yielded dict.

    processors  multiprocessors of the device; 132 is an H100 or H200
    The device of the tensors is the CPU, because autograd supports no other one if torch is built without CUDA.
    """
    from triton.runtime.jit import JITFunction

    launches: dict[Launch, None] = {}

    def record(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        assert all(type(n) is int and n > 0 for n in grid)
        launches[Launch.of(kernel, arguments, options)] = None

    properties = SimpleNamespace(multi_processor_count=processors)
    with ExitStack() as stack:
        for owner, name, value in (
            (FakeTensor, "is_cuda", True),
            (JITFunction, "run", record),
            (torch.cuda, "get_device_properties", lambda device: properties),
            (torch, "_assert_async", lambda *arguments: None),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode())
        yield launches
