"""Attention over packed documents: one function, whichever varlen kernel is installed behind it.

Writing an attention kernel would duplicate what flash-attn, xformers and PyTorch already maintain; what is missing is
one signature for them. The back end is chosen once per device kind, logged, and can be named by the caller. The CPU has
no varlen kernel: documents of similar length are padded into a few batched SDPA calls, which under a causal mask needs
no extra mask, because padding at the end is in every real token's future.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

BACKENDS = ("flash_attn", "xformers", "varlen_attn", "sdpa")

# What one more SDPA call costs (slicing, dispatch, backward nodes), in units of heads x head_dim x length^2.
# About 100 us on one AVX-512 core; padding is accepted while it is cheaper than that.
_CALL_COST = 450_000


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each packed document to itself.

    q           (T, H, D)
    k, v        (T, K, D) with H a multiple of K: grouped-query attention shares each key head among H / K queries
    cu_seqlens  (S + 1,) int32, the documents' boundaries: 0, ..., T
    max_seqlen  at least the longest document's length, on the host, so that nothing waits for the device
    scale       of the scores; 1 / sqrt(D) when None
    backend     "auto" or one of BACKENDS; "sdpa" serves every device but copies `cu_seqlens` to the host
    Returns (T, H, D). Raises ValueError on shapes that do not fit or a back end that is not installed.
    """
    if q.dim() != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"packed_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError("packed_attention: cu_seqlens must be a one-dimensional int32 tensor")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = choose_backend(q.device.type, q.dtype) if backend == "auto" else backend
    if name == "sdpa":
        return _sdpa(q, k, v, cu_seqlens, causal, scale)
    return _load(name)(q, k, v, cu_seqlens, max_seqlen, causal, scale)


# Plain dictionaries: torch.compile reads them, where it cannot follow an import.
_chosen: dict[tuple[str, torch.dtype], str] = {}
_loaded: dict[str, Callable[..., Tensor]] = {}


def choose_backend(device_type: str, dtype: torch.dtype) -> str:
    """The first installed back end that serves half precision on CUDA; "sdpa" for everything else.

    The choice is made once. Call this before torch.compile, which cannot import.
    """
    name = _chosen.get((device_type, dtype))
    if name is None:
        name = _chosen[device_type, dtype] = _search(device_type, dtype)
    return name


def _search(device_type: str, dtype: torch.dtype) -> str:
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    for name in BACKENDS[:-1]:
        try:
            _load(name)
        except ValueError:
            continue
        log.info("packed_attention uses %s", name)
        return name
    log.warning("packed_attention found no varlen kernel: each call copies the document boundaries to the host")
    return "sdpa"


def _load(name: str) -> Callable[..., Tensor]:
    function = _loaded.get(name)
    if function is None:
        function = _loaded[name] = _import(name)
    return function


def _import(name: str) -> Callable[..., Tensor]:
    loaders = {"flash_attn": _flash_attn, "xformers": _xformers, "varlen_attn": _varlen_attn}
    if name not in loaders:
        raise ValueError(f"packed_attention: unknown backend {name!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    try:
        return loaders[name]()
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"packed_attention: backend {name!r} is not usable here: {error}") from error


def _flash_attn() -> Callable[..., Tensor]:
    # Newest first: 4 (CuTe), 3 (Hopper), 2. They share the call; 3 and 4 may return (out, lse).
    for module in ("flash_attn.cute", "flash_attn_interface", "flash_attn"):
        try:
            function = import_module(module).flash_attn_varlen_func
            break
        except (ImportError, AttributeError):
            continue
    else:
        raise ImportError("none of flash_attn.cute, flash_attn_interface and flash_attn has flash_attn_varlen_func")

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
    ) -> Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            causal=causal,
        )
        return out[0] if isinstance(out, tuple) else out

    return attend


def _xformers() -> Callable[..., Tensor]:
    fmha: Any = import_module("xformers.ops.fmha")
    bias: Any = import_module("xformers.ops.fmha.attn_bias")
    lengths_of: Any = bias._SeqLenInfo

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
    ) -> Tensor:
        # Built from the device tensor: the public `from_seqlens` wants host lengths and would synchronise.
        info = lengths_of(seqstart=cu_seqlens, max_seqlen=max_seqlen, min_seqlen=1, seqstart_py=[])
        mask = (bias.BlockDiagonalCausalMask if causal else bias.BlockDiagonalMask)(q_seqinfo=info, k_seqinfo=info)
        groups = k.shape[1]
        q5 = q.unflatten(1, (groups, -1))
        k5, v5 = (t.unsqueeze(2).expand_as(q5) for t in (k, v))
        out = fmha.memory_efficient_attention(q5[None], k5[None], v5[None], attn_bias=mask, scale=scale)
        return out[0].flatten(1, 2)

    return attend


def _varlen_attn() -> Callable[..., Tensor]:
    from inspect import signature

    function = import_module("torch.nn.attention.varlen").varlen_attn
    parameters = signature(function).parameters
    windowed, grouped = "window_size" in parameters, "enable_gqa" in parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
    ) -> Tensor:
        options: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)} if windowed else {"is_causal": causal}
        if k.shape[1] != q.shape[1]:
            if grouped:
                options["enable_gqa"] = True
            else:
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        if "scale" in parameters:
            options["scale"] = scale
        else:
            q = q * (scale * q.shape[-1] ** 0.5)
        return function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)

    return attend


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    bounds = tuple(cu_seqlens.tolist())
    if bounds[:1] != (0,) or bounds[-1] != q.shape[0] or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"packed_attention: cu_seqlens must rise from 0 to the {q.shape[0]} rows of q")
    if q.shape[0] == 0:
        return q * (k.sum() + v.sum())  # nothing, but attached to all three inputs
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    groups, order = _plan(bounds, q.shape[1] * q.shape[2], causal)
    parts = [_attend_group(q, k, v, slots, length, padded, causal, scale) for slots, length, padded in groups]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out if order is None else out.index_select(0, order.to(q.device))


def _attend_group(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, length: int, padded: Tensor | None, causal: bool, scale: float
) -> Tensor:
    rows = slots.to(q.device)
    qs, ks, vs = (t.index_select(0, rows).view(-1, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    # A document's padding repeats its last token, so every score stays finite and the copies' gradients are zero.
    out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale).transpose(1, 2).flatten(0, 1)
    return out if padded is None else out.index_select(0, padded.to(q.device))


Group = tuple[Tensor, int, Tensor | None]


@lru_cache(maxsize=64)
def _plan(bounds: tuple[int, ...], width: int, causal: bool) -> tuple[list[Group], Tensor | None]:
    """Batches of documents, longest first: (gathered rows, padded length, where the real tokens are in the batch).

    The second result undoes the ordering by length (None when there is nothing to undo).
    """
    documents = sorted(((b - a, a) for a, b in itertools.pairwise(bounds) if b > a), key=lambda d: (-d[0], d[1]))
    batches: list[list[tuple[int, int]]] = []
    for length, start in documents:
        longest = batches[-1][0][0] if batches else 0
        waste = width * (longest**2 - length**2)
        # Without a causal mask a query would see the padding, so only equal lengths share a call.
        if batches and (length == longest or (causal and waste < _CALL_COST)):
            batches[-1].append((length, start))
        else:
            batches.append([(length, start)])
    groups: list[Group] = []
    for batch in batches:
        longest = batch[0][0]
        starts = torch.tensor([s for _, s in batch])[:, None]
        lengths = torch.tensor([n for n, _ in batch])[:, None]
        step = torch.arange(longest)
        slots = (starts + step.minimum(lengths - 1)).flatten()
        real = (step < lengths).flatten()
        groups.append((slots, longest, None if bool(real.all()) else real.nonzero().flatten()))
    visited = torch.cat([torch.arange(s, s + n) for n, s in documents])
    order = visited.argsort()
    return groups, None if torch.equal(order, torch.arange(len(order))) else order
