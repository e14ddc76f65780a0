"""Packed attention inside a Hugging Face text model: the attention function, and the text model's forward.

The text model gets one row without padding, so that its linear layers skip the padding too. The vision tower keeps its
own attention. Boundaries reach the layers as the keyword arguments `cu_seq_lens_q` and `max_length_q`, the names that
transformers uses for flash-attn, and therefore survive activation checkpointing.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor, nn

from pite_kernels.attention import packed_attention
from pite_kernels.dispatch import autocast
from pite_kernels.patching.documents import Documents, find_documents
from pite_kernels.patching.refusals import LOSS_ONLY
from pite_kernels.patching.state import Patch

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_PER_TOKEN = ("input_ids", "inputs_embeds", "visual_pos_masks")
"""Arguments (B, T, ...) of text models, without positions."""

_calls = threading.local()  # .count: how often `attend` ran


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function: q (1, H, T, D), k and v (1, K, T, D) -> (1, T, H, D).

    options  what transformers' layers pass: scaling, cu_seq_lens_q, max_length_q and others; kv_rows with
             cu_seq_lens_k and max_length_k for documents with a shared prefix. ValueError for what is not supported
    """
    bounds, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
    if bounds is None or longest is None or attention_mask is not None or len(q) != 1:
        raise ValueError(
            f"patch: {type(module).__name__} got no document boundaries: its model does not pass them on, it was called by "
            f"itself, or it belongs to another model that shares the config of a patched one{LOSS_ONLY}"
        )
    check_options(module, options, longest)
    keys: dict[str, Any] = {}
    if options.get("kv_rows") is not None:
        keys = {
            "kv_rows": options["kv_rows"],
            "cu_seqlens_kv": options.get("cu_seq_lens_k"),
            "max_seqlen_kv": options.get("max_length_k"),
        }
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    q, k, v = (autocast(t[0].transpose(0, 1)) for t in (q, k, v))
    out = packed_attention(q, k, v, bounds, longest, **keys, causal=causal, scale=options.get("scaling"))
    _calls.count = getattr(_calls, "count", 0) + 1
    return out[None], None


def check_options(module: nn.Module, options: dict[str, Any], longest: int) -> None:
    """Raise ValueError if a layer wants what packed attention does not compute."""
    layer = type(module).__name__
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"patch: {layer} passes {name}, which packed attention does not compute{LOSS_ONLY}")
    if options.get("dropout"):
        raise ValueError(f"patch: {layer} has attention dropout {options['dropout']}; set it to 0, or{LOSS_ONLY[1:]}")
    check_window("sliding_window", options.get("sliding_window"), longest)


def check_window(field: str, window: int | None, longest: int) -> None:
    """Raise ValueError if a sliding window of that many tokens would hide part of a document."""
    if window is not None and longest > window:
        raise ValueError(
            f"patch: {field} is {window}, but a document has {longest} tokens, and packed attention has no window{LOSS_ONLY}"
        )


def text_forward(patch: Patch, text: nn.Module, call: dict[str, Any]) -> Any:
    """The forward of the patched text model: on one packed row, or with the model's own attention for generation."""
    documents = _documents(text, call)
    if documents is None:
        with patch.own_attention():
            return patch.own(text, "forward")(**call)
    patch.documents = documents
    check_window(*patch.window, documents.longest)
    _check_call(text, call, documents)
    wanted = call.pop("return_dict", None)
    packed = _packed(call, documents)
    _calls.count = 0
    out = patch.own(text, "forward")(**packed, return_dict=True)
    layers = text.config.num_hidden_layers  # type: ignore[union-attr]
    if _calls.count != layers:
        raise ValueError(
            f"patch: {_calls.count} of the {layers} layers of {type(text).__name__} use packed attention, and the "
            f"others may mix documents{LOSS_ONLY}"
        )
    out = out if documents.one_row else _unpacked(out, documents)
    return out.to_tuple() if wanted is False else out


def _documents(text: nn.Module, call: dict[str, Any]) -> Documents | None:
    """The batch's documents. None where the model's own attention is needed: for a cache, or for a mask (B, 1, T, T).

    A new cache is filled only where each row is one document, because only then the caller may continue.
    """
    mask, given, cache = call.get("attention_mask"), call.get("cu_seq_lens_q"), call.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        if given is not None:
            raise ValueError("patch: cu_seq_lens_q and past_key_values exclude each other")
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        if given is not None or torch.is_grad_enabled():
            raise ValueError("patch: attention_mask must be (B, T), or left out where cu_seq_lens_q is passed")
        return None
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    documents = find_documents(
        tuple(tokens.shape[:2]),
        tokens.device,
        cu_seqlens=given,
        longest=call.get("max_length_q"),
        attention_mask=mask,
        # Positions of segments that continue a shared prefix do not restart.
        position_ids=None if call.get("kv_rows") is not None else call.get("position_ids"),
    )
    wanted = call.get("use_cache")
    wanted = getattr(text.config, "use_cache", False) if wanted is None else wanted
    wanted = cache is not None or (wanted and not torch.is_grad_enabled())
    return None if wanted and given is None and len(documents.cu_seqlens) - 1 == len(tokens) else documents


def _check_call(text: nn.Module, call: dict[str, Any], documents: Documents) -> None:
    for name in ("output_attentions", "output_router_logits"):
        if call.get(name) or (call.get(name) is None and getattr(text.config, name, False)):
            raise ValueError(f"patch: {name} is not supported with packed attention{LOSS_ONLY}")
    known = (*_PER_TOKEN, "attention_mask", "position_ids")
    for name, value in call.items():
        per_token = isinstance(value, Tensor) and tuple(value.shape[:2]) == documents.shape and name not in known
        if per_token and not documents.one_row:
            raise ValueError(
                f"patch: {type(text).__name__} gets {name} for each token, which patch cannot pack{LOSS_ONLY}"
            )


def _packed(call: dict[str, Any], documents: Documents) -> dict[str, Any]:
    """The arguments for one packed row."""
    packed = {name: value for name, value in call.items() if name not in _BOUNDARIES}
    positions = call.get("position_ids")
    if call.get("kv_rows") is not None:
        if positions is None or not documents.one_row:
            raise ValueError("patch: kv_rows needs position_ids, and one row of documents with cu_seq_lens_q")
        packed |= {name: call.get(name) for name in ("cu_seq_lens_k", "max_length_k")}
    else:
        for name in _PER_TOKEN:
            if call.get(name) is not None:
                packed[name] = documents.pack(call[name])
        positions = documents.pack_positions(positions)
        if positions.dim() == 3 and documents.one_row:
            positions = documents.restart(positions)
    return packed | {
        "attention_mask": None,
        "position_ids": positions,
        "past_key_values": None,
        "use_cache": False,
        "cu_seq_lens_q": documents.cu_seqlens,
        "max_length_q": documents.longest,
    }


def _unpacked(out: Any, documents: Documents) -> Any:
    """The model's output with (B, T, ...) for each (1, N, ...)."""

    def back(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(back(v) for v in value)
        packed = isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (1, documents.count)
        return documents.unpack(value) if packed else value

    return dataclasses.replace(out, **{field.name: back(getattr(out, field.name)) for field in dataclasses.fields(out)})
