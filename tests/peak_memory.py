"""Peak memory of tensors, counted at every operator: on a CPU, on fake tensors, and inside our own operators."""

from __future__ import annotations

import importlib
import pkgutil
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pite_kernels


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators create in this context, and of those passed to `own`: `now` and `peak`.

    block  sizes are rounded up to a multiple of it; CUDA's caching allocator uses 512
    Not counted are inputs from outside, mapped files and tensors on the meta device. Our own operators run their real
    bodies, so that their intermediate tensors are counted too.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self._block = block
        self._alive: dict[int, int] = {}
        self._given: set[int] = set()
        self._bodies = operator_bodies()
        self.now = self.peak = 0

    def own(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = -(-storage.nbytes() // self._block) * self._block
            self.now += self._alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)

    def _give(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive and key not in self._given:
            self._given.add(key)
            weakref.finalize(storage, self._given.discard, key)  # its address may be reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors((args, kwargs)):
            self._give(tensor)
        if func in self._bodies:
            with self:
                out = self._bodies[func](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        mapped = "set_" in str(func)  # safetensors uses set_ for slices of a mapped file
        for tensor in tensors(out):
            if mapped:
                self._give(tensor)
            elif tensor.untyped_storage()._cdata not in self._given:
                self.own(tensor)
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.device.type != "meta"]


def operator_bodies() -> dict[Any, Callable[..., Any]]:
    names = [m.name for m in pkgutil.iter_modules(pite_kernels.__path__) if m.name != "_C"]
    modules = [importlib.import_module(f"pite_kernels.{name}") for name in names]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, CustomOpDef)]
    return {op._opoverload: op._init_fn for op in found}
