"""`patch(model)`, and its undo.

Only attributes of the given instance change: `forward` and `generate` of the model, `forward` of its text model, and
the attention implementation in the text model's config. They are bound methods, so that a deep copy of the model runs
on its own parameters. The class and the library stay as they are; transformers' AttentionInterface gets one more name.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import nn

from pite_kernels.cross_entropy import check_smoothing
from pite_kernels.patch import refusals
from pite_kernels.patch.attention import NAME, attend, text_forward
from pite_kernels.patch.documents import Documents
from pite_kernels.patch.loss import loss_forward

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
            self._set_attention(own=True)
        self.active, wrapped = False, set()
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
        return getattr(type(owner), name).__get__(owner) if method is None else method  # type: ignore[no-any-return]

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Everything inside runs as if the model were not patched."""
        if not self.active:
            yield
            return
        self.active = False
        self._set_attention(own=True)
        try:
            yield
        finally:
            self.active = True
            self._set_attention(own=False)

    def _set_attention(self, own: bool) -> None:
        for config, implementation in self.configs:
            config._attn_implementation_internal = implementation if own else NAME

    def install(self) -> None:
        """Replace the methods, and set the attention implementation."""
        replaced = [(self.model, "forward", _model_forward)]
        if self.attention:
            replaced += [(self.text, "forward", _text_forward)] if self.text is not self.model else []
            replaced += [(self.model, "generate", _generate)] if hasattr(self.model, "generate") else []
        for owner, name, function in replaced:
            self.before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, MethodType(_like(owner, name, function, self.key), owner))
            setattr(owner, self.key, self)
        self._set_attention(own=False)


def patch(model: nn.Module, *, loss: bool = True, attention: bool = True, label_smoothing: float = 0.0) -> Patch:
    """Let a Hugging Face model train with `linear_cross_entropy` and `packed_attention`.

    model            a `*ForConditionalGeneration` or `*ForCausalLM` of transformers, or a PEFT model around one
    loss             with `labels` (B, T) the output has the loss, and no logits while gradients are computed. Only rows
                     with a label go through the head. `num_items_in_batch` is the normalizer. `rows` and `target_ids`
                     (L,), for `model(..., labels=..., rows=..., target_ids=...)`, avoid the search for these rows,
                     which waits for the GPU
    attention        the text model computes on one row without padding. Documents are those of `cu_seq_lens_q` and
                     `max_length_q`, else of position_ids that restart at 0, else the rows of the batch without what
                     attention_mask excludes. With it, a label counts if its token and the one before are in one document
    label_smoothing  of the loss
    Returns a handle with `undo()`. Raises ValueError for a model whose loss or attention would not be the model's own.
    """
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise ValueError("patch: needs the package transformers, which is not installed") from error
    check_smoothing(label_smoothing)
    if not (loss or attention):
        raise ValueError("patch: loss and attention are both False, so nothing would change")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(f"patch: {type(model).__name__} is not a model of transformers")
    if any(isinstance(value, Patch) and value.active for value in vars(model).values()):
        raise ValueError(f"patch: {type(model).__name__} is patched already; undo() that patch first")
    text = refusals.text_model(model)
    if loss:
        refusals.check_loss(model)
    configs: list[tuple[Any, str]] = []
    if attention:
        refusals.check_attention(model, text)
        configs = [(c, c._attn_implementation_internal) for c in refusals.text_configs(model, text)]
        transformers.AttentionInterface.register(NAME, attend)
    window = refusals.window(text) if attention else ("", None)
    handle = Patch(model, text, loss, attention, label_smoothing, window, configs)
    handle.install()
    return handle


def _restore(owner: nn.Module, name: str, method: Any) -> None:
    if method is None:
        delattr(owner, name)
    else:
        setattr(owner, name, method)


def _like(owner: nn.Module, name: str, function: Callable[..., Any], key: str) -> Callable[..., Any]:
    """`function` with the signature of the method that it replaces, because transformers' Trainer inspects it."""

    @wraps(getattr(type(owner), name))
    def like(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle = vars(self)[key]
        if handle.active:
            return function(handle, self, *args, **kwargs)
        return handle.own(self, name)(*args, **kwargs)

    vars(like)["key"] = key
    return like


@cache
def _names(cls: type) -> tuple[str, ...]:
    """Parameters of the class's forward, without self."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_names(type(module)), args)), **kwargs}


def _text_forward(handle: Patch, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return text_forward(handle, self, _call(self, args, kwargs))


def _generate(handle: Patch, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with handle.own_attention():
        return handle.own(self, "generate")(*args, **kwargs)


def _model_forward(handle: Patch, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = _call(self, args, kwargs)
    handle.documents = None
    if handle.attention and (torch.is_grad_enabled() or call.get("labels") is not None):
        refusals.check_positions(self, call)
    if handle.loss and call.get("labels") is not None:
        return loss_forward(handle, self, call)
    if call.get("rows") is not None or call.get("target_ids") is not None:
        raise ValueError("patch: rows and target_ids need labels, and patch(model, loss=True)")
    return handle.own(self, "forward")(**call)
