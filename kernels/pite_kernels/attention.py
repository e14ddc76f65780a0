"""Attention over packed documents: one function for whichever varlen kernel is installed.

flash-attn, xformers and PyTorch already maintain attention kernels, so this file has none; it gives them one
signature. An installed back end may still fail, so a trial chooses one for each kind of call; the caller can also name
one. The CPU has no varlen kernel: documents of similar length are padded into a few batched SDPA calls. A causal mask
is enough there, because the padding at a document's end is in the future of all its tokens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

# In order of preference. The first three are flash-attn's modules: versions 4 (CuTe), 3 (Hopper) and 2.
BACKENDS = ("flash_attn.cute", "flash_attn_interface", "flash_attn", "xformers", "varlen_attn", "sdpa")

_KERNEL_DEVICES = ("cuda",)
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)

# Relative to the largest value. Half precision is off by 0.1 to 0.6%; a wrong mask, scale or order of heads by 20% and
# more.
_TOLERANCE = 0.05

# Overhead of one more SDPA call (slicing, dispatch, backward nodes), in units of heads x head_dim x length^2.
# About 100 us on one AVX-512 core. Documents are padded to share a call while the padding is cheaper than that.
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
    """Self-attention within each packed document.

    q           (T, H, D)
    k, v        (T, K, D) with H a multiple of K: grouped-query attention shares each key head among H / K queries
    cu_seqlens  (S + 1,) int32, the documents' boundaries: 0, ..., T
    max_seqlen  at least the longest document's length, a Python int, so that the host never waits for the device
    scale       factor of the scores; 1 / sqrt(D) when None
    backend     "auto" or one of BACKENDS; "sdpa" runs on every device but copies `cu_seqlens` to the host
    Returns (T, H, D). Raises ValueError on shapes that do not fit or a back end that is not installed.
    """
    if q.dim() != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"packed_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError("packed_attention: cu_seqlens must be a one-dimensional int32 tensor")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = backend
    if backend == "auto":
        name = choose_backend(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2], causal)
    if name == "sdpa":
        return _sdpa(q, k, v, cu_seqlens, causal, scale)
    return _load(name)(q, k, v, cu_seqlens, max_seqlen, causal, scale)


# Plain dictionaries, so that torch.compile can read them.
_chosen: dict[tuple[torch.device, torch.dtype, int, int, int, bool], str] = {}
_loaded: dict[str, Callable[..., Tensor]] = {}


def choose_backend(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, causal: bool = True
) -> str:
    """The name in BACKENDS that "auto" uses for such calls; "sdpa" for all but half precision on CUDA.

    device  with its index On CUDA it is the first back end whose small forward and backward pass agrees with SDPA;
    back ends that fail are logged with the reason. The trial runs once and waits for the device. The first forward
    pass of a model runs it. Call this function earlier if that first call would be inside a CUDA graph capture, or
    inside a backward pass: the trial's backward would wait for that pass.
    """
    if device.type not in _KERNEL_DEVICES or dtype not in _KERNEL_DTYPES:
        return "sdpa"
    key = (device, dtype, heads, key_heads, head_dim, causal)
    name = _chosen.get(key)
    if name is None:
        name = _chosen[key] = _choose(*key)
    return name


@torch.compiler.assume_constant_result
def _choose(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, causal: bool) -> str:
    # In a separate thread, so that no mode of the caller applies: no_grad, autocast, fake tensors, or activation
    # checkpointing, which would count the tensors that the trial saves as the layer's.
    start = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, "attention", start) as pool:
        return pool.submit(_first_that_works, device, dtype, heads, key_heads, head_dim, causal).result()


def _first_that_works(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, causal: bool
) -> str:
    for name in BACKENDS[:-1]:
        try:
            attend = _load(name)
        except ValueError as error:
            absent = isinstance(error.__cause__, ModuleNotFoundError)
            log.log(logging.INFO if absent else logging.WARNING, "%s", error)
            continue
        reason = _trial_error(attend, device, dtype, heads, key_heads, head_dim, causal)
        if reason is None:
            log.info("packed_attention uses %s", name)
            return name
        log.warning("packed_attention skips %s: %s", name, reason)
    log.warning(
        "packed_attention found no varlen kernel and falls back to SDPA: "
        "each call copies the document boundaries to the host"
    )
    return "sdpa"


def _trial_error(
    attend: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    head_dim: int,
    causal: bool,
) -> str | None:
    """Run one forward and backward pass over two documents; returns what is wrong with the back end, or None."""
    lengths, parts, scale = (33, 95), (heads, key_heads, key_heads), 0.8 * head_dim**-0.5
    # A separate generator, so that the caller's random numbers do not change.
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    fused = normal(sum(lengths), sum(parts), head_dim).to(device, dtype)
    upstream = normal(sum(lengths), heads, head_dim).to(device, dtype)
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        # q, k and v are slices of one fused tensor, as in a model.
        leaf = fused.to(dtype, copy=True).requires_grad_()
        out = function(*leaf.split(parts, 1))
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(dtype))
        return [out.detach(), *gradient.split(parts, 1)]

    expected = results(lambda q, k, v: _sdpa(q, k, v, bounds, causal, scale), torch.float32)
    try:
        found = results(lambda q, k, v: attend(q, k, v, bounds, max(lengths), causal, scale), dtype)
        if found[0].dtype != dtype or found[0].shape != expected[0].shape:
            return f"it returns {found[0].dtype} {tuple(found[0].shape)}"
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected)]
    except Exception as error:  # an unknown version of a back end may raise anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for name, relative_error in zip(("output", "gradient of q", "gradient of k", "gradient of v"), errors):
        if not relative_error <= _TOLERANCE:  # catches NaN too
            return f"its {name} is off by {relative_error:.0%}"
    return None


def _load(name: str) -> Callable[..., Tensor]:
    function = _loaded.get(name)
    if function is None:
        function = _loaded[name] = _import(name)
    return function


def _import(name: str) -> Callable[..., Tensor]:
    loaders: dict[str, Callable[[], Callable[..., Tensor]]] = {
        **{module: partial(_flash_attn, module) for module in BACKENDS[:3]},
        "xformers": _xformers,
        "varlen_attn": _varlen_attn,
    }
    if name not in loaders:
        raise ValueError(f"packed_attention: unknown backend {name!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    try:
        return loaders[name]()
    except Exception as error:  # a package built for another torch or device may raise anything
        raise ValueError(f"packed_attention: backend {name!r} is not usable here: {error}") from error


def _flash_attn(module: str) -> Callable[..., Tensor]:
    function: Any = import_module(module).flash_attn_varlen_func

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
        return out[0] if isinstance(out, tuple) else out  # 3 and 4 may return (out, lse)

    return attend


def _xformers() -> Callable[..., Tensor]:
    fmha: Any = import_module("xformers.ops.fmha")
    bias: Any = import_module("xformers.ops.fmha.attn_bias")
    lengths_of: Any = bias._SeqLenInfo

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
    ) -> Tensor:
        # Built from the device tensor: the public `from_seqlens` needs lengths on the host and would synchronize.
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
        return q * (k.sum() + v.sum())  # empty, but still part of the autograd graph of all three inputs
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
    # The padding of a document repeats its last token: all scores stay finite, and the padding's gradients are zero.
    out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale).transpose(1, 2).flatten(0, 1)
    return out if padded is None else out.index_select(0, padded.to(q.device))


Group = tuple[Tensor, int, Tensor | None]


@lru_cache(maxsize=64)
def _plan(bounds: tuple[int, ...], width: int, causal: bool) -> tuple[list[Group], Tensor | None]:
    """Batches of documents, longest first: (gathered rows, padded length, positions of the real tokens in the batch).

    The second result is the index that undoes the sorting by length (None if the order has not changed).
    """
    documents = sorted(((b - a, a) for a, b in itertools.pairwise(bounds) if b > a), key=lambda d: (-d[0], d[1]))
    batches: list[list[tuple[int, int]]] = []
    for length, start in documents:
        longest = batches[-1][0][0] if batches else 0
        waste = width * (longest**2 - length**2)
        # Without a causal mask queries would attend to the padding, so only documents of equal length share a call.
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
