"""Bytes of host tensors alive at once, counted at every operation; mapped files are the page cache's and do not count."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within the block, `now` are the bytes that operations allocated and that live, `peak` the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # A view allocates nothing; `set_` is how safetensors names a piece of a mapped file.
        if not func.is_view and "set_" not in str(func):
            for tensor in tree_iter(made):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                    self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
