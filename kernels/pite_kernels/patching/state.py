"""What `patch(model)` changed in a model, and its undo."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

from pite_kernels.patching.documents import Documents

NAME = "pite_packed"
"""Of the attention function, in the model's config while it is patched."""

_numbers = itertools.count()


@dataclass(eq=False)
class Patch:
    """A patched model. `undo()` restores it; as a context manager it does so at the end.

    window   name and value of the config's sliding window that layers use; value None: no window
    configs  the text model's configs, each with its own attention implementation
    """

    model: nn.Module
    text: nn.Module
    loss: bool
    attention: bool
    label_smoothing: float
    window: tuple[str, int | None]
    configs: list[tuple[Any, str]]
    before: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    documents: Documents | None = None
    active: bool = True
    key: str = field(default_factory=lambda: f"_pite_kernels_patch_{next(_numbers)}")
    """Name of the attribute that holds this handle: of the model, and of the text model."""

    def undo(self) -> None:
        """Restore the model. Code that has wrapped the patched forward since then gets the model's own results too."""
        if self.active:
            self.set_attention(own=True)
        self.active = False
        wrapped: set[int] = set()
        for owner, name, method in self.before:
            if self._is_mine(vars(owner).get(name)):
                _restore(owner, name, method)
            elif name in vars(owner):
                wrapped.add(id(owner))  # by other code, which still needs this handle to find the model's own method
        for owner in (self.model, self.text):
            if id(owner) not in wrapped:
                vars(owner).pop(self.key, None)

    def _is_mine(self, method: Any) -> bool:
        return isinstance(method, MethodType) and vars(method.__func__).get("key") == self.key

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def own(self, owner: nn.Module, name: str) -> Callable[..., Any]:
        """The method that `owner` had before."""
        method = next(m for module, n, m in self.before if module is owner and n == name)
        return MethodType(getattr(type(owner), name), owner) if method is None else method

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Everything inside runs as if the model were not patched."""
        if not self.active:
            yield
            return
        self.active = False
        self.set_attention(own=True)
        try:
            yield
        finally:
            self.active = True
            self.set_attention(own=False)

    def set_attention(self, own: bool) -> None:
        """The attention of the text model: packed, or its own."""
        for config, implementation in self.configs:
            config._attn_implementation_internal = implementation if own else NAME


def _restore(owner: nn.Module, name: str, method: Any) -> None:
    if method is None:
        delattr(owner, name)
    else:
        setattr(owner, name, method)
