"""`patch(model)`.

Only attributes of the given instance change: `forward` and `generate` of the model, `forward` of its text model, and
the attention implementation in the text model's config. They are bound methods, so that a deep copy of the model runs
on its own parameters. The class and the library stay as they are; transformers' AttentionInterface gets one more name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import nn

from pite_kernels.cross_entropy import check_smoothing
from pite_kernels.patching import refusals
from pite_kernels.patching.attention import attend, text_forward
from pite_kernels.patching.loss import loss_forward
from pite_kernels.patching.state import NAME, Patch


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
    _install(handle)
    return handle


def _install(handle: Patch) -> None:
    replaced = [(handle.model, "forward", _model_forward)]
    if handle.attention:
        replaced.append((handle.text, "forward", _text_forward))
        if hasattr(handle.model, "generate"):
            replaced.append((handle.model, "generate", _generate))
    for owner, name, function in replaced:
        handle.before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, MethodType(_like(owner, name, function, handle.key), owner))
        setattr(owner, handle.key, handle)
    handle.set_attention(own=False)


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
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    return {**dict(zip(_parameters(type(module).forward)[1:], args)), **kwargs}


def _text_forward(handle: Patch, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return text_forward(handle, self, _call(self, args, kwargs))


def _generate(handle: Patch, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with handle.own_attention():
        return handle.own(self, "generate")(*args, **kwargs)


def _model_forward(handle: Patch, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = _call(self, args, kwargs)
    handle.documents = None
    if not handle.attention:
        refusals.check_boundaries(handle.text, call)
    if handle.attention and (torch.is_grad_enabled() or call.get("labels") is not None):
        refusals.check_positions(self, call)
        refusals.check_adjacent_media(self, call)
    if handle.loss:
        refusals.check_labels(call)
    if handle.loss and call.get("labels") is not None:
        return loss_forward(handle, self, call)
    if call.get("rows") is not None or call.get("target_ids") is not None:
        raise ValueError("patch: rows and target_ids need labels, and patch(model, loss=True)")
    return handle.own(self, "forward")(**call)
