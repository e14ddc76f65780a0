"""Attention over packed documents: one function for whichever varlen kernel is installed.

flash-attn, xformers and PyTorch already maintain attention kernels, so this file has none; it gives them one
signature. An installed back end may still fail, so a trial chooses one for each kind of call; the caller can also name
one. The CPU has no varlen kernel: documents of similar length are padded into a few batched SDPA calls. A causal mask
is enough there, because the padding at a document's end is in the future of all its tokens.

A document may have more keys than queries: the keys of a prefix that other documents share, and that is computed once.
The mask is then aligned at the end (the last query attends to all keys), as in flash-attn from 2.1 on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pite_kernels.rows import RowIndex, gather_rows

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
    kv_rows: RowIndex | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_kv: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Self-attention within each packed document.

    q           (T, H, D)
    k, v        (T, K, D) with H a multiple of K: grouped-query attention shares each key head among H / K queries
    cu_seqlens  (S + 1,) int32, the documents' boundaries: 0, ..., T
    max_seqlen  at least the longest document's length, a Python int, so that the host never waits for the device
    kv_rows     the rows of k and v that each document attends to, one document after the other: those of the prefix
                that it shares, then its own. None if k and v hold them in this order already
    cu_seqlens_kv, max_seqlen_kv  boundaries (S + 1,) int32 of the documents' keys, and the longest; None: those of q.
                A causal mask is aligned at the end, so a document has at least as many keys as queries
    scale       factor of the scores; 1 / sqrt(D) when None
    backend     "auto" or one of BACKENDS; "sdpa" runs on every device but copies the boundaries to the host
    Returns (T, H, D). Raises ValueError on shapes that do not fit or a back end that is not installed.
    """
    if kv_rows is not None:
        if cu_seqlens_kv is None:
            raise ValueError("packed_attention: kv_rows needs cu_seqlens_kv and max_seqlen_kv")
        k, v = gather_rows(k, kv_rows), gather_rows(v, kv_rows)
    rows_fit = k.shape[0] == q.shape[0] or cu_seqlens_kv is not None
    if q.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1] or not rows_fit:
        raise ValueError(f"packed_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if cu_seqlens_kv is None or max_seqlen_kv is None:
        if cu_seqlens_kv is not max_seqlen_kv:
            raise ValueError("packed_attention: give both cu_seqlens_kv and max_seqlen_kv, or neither")
        cu_seqlens_kv, max_seqlen_kv = cu_seqlens, max_seqlen
    for bounds in (cu_seqlens, cu_seqlens_kv):
        if bounds.dim() != 1 or bounds.dtype != torch.int32 or len(bounds) != len(cu_seqlens):
            raise ValueError(
                "packed_attention: cu_seqlens must be a one-dimensional int32 tensor, and cu_seqlens_kv as long"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = backend
    if backend == "auto":
        name = choose_backend(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2], causal)
    attend = _sdpa if name == "sdpa" else _load(name)
    return attend(q, k, v, cu_seqlens, cu_seqlens_kv, max_seqlen, max_seqlen_kv, causal, scale)


# Plain dictionaries, so that torch.compile can read them.
_chosen: dict[tuple[torch.device, torch.dtype, int, int, int, bool], str] = {}
_loaded: dict[str, Callable[..., Tensor]] = {}


def choose_backend(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, causal: bool = True
) -> str:
    """The name in BACKENDS that "auto" uses for such calls; "sdpa" for all but half precision on CUDA.

    On CUDA it is the first back end whose small forward and backward pass agrees with SDPA; back ends that fail are
    logged with the reason. The trial runs once and waits for the device. The first forward pass of a model runs it.
    Call this function earlier if that first call would be inside a CUDA graph capture, or inside a backward pass: the
    trial's backward would wait for that pass.

    device  with its index
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
    """Run one forward and backward pass over three documents; returns what is wrong with the back end, or None.

    The second is longer than a tile of any back end. The third continues it: its keys are the second's and its own.
    """
    lengths, parts, scale = (33, 300, 95), (heads, key_heads, key_heads), 0.8 * head_dim**-0.5
    # A separate generator, so that the caller's random numbers do not change.
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    fused = normal(sum(lengths), sum(parts), head_dim).to(device, dtype)
    upstream = normal(sum(lengths), heads, head_dim).to(device, dtype)
    queries, keys = (0, 33, 333, 428), (0, 33, 333, 728)
    bounds, key_bounds = (torch.tensor(b, dtype=torch.int32, device=device) for b in (queries, keys))
    rows = torch.tensor([*range(333), *range(33, 428)], device=device)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        # q, k and v are slices of one fused tensor, as in a model.
        leaf = fused.to(dtype, copy=True).requires_grad_()
        _, k, v = leaf.index_select(0, rows).split(parts, 1)
        out = function(leaf[:, :heads], k, v, bounds, key_bounds, 300, 395, causal, scale)
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(dtype))
        return [out.detach(), *gradient.split(parts, 1)]

    expected = results(_sdpa, torch.float32)
    try:
        found = results(attend, dtype)
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

    def attend(q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, *rest: Any) -> Tensor:
        longest_q, longest_k, causal, scale = rest
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=of_q,
            cu_seqlens_k=of_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            softmax_scale=scale,
            causal=causal,
        )
        return out[0] if isinstance(out, tuple) else out  # 3 and 4 may return (out, lse)

    return attend


def _xformers() -> Callable[..., Tensor]:
    fmha: Any = import_module("xformers.ops.fmha")
    bias: Any = import_module("xformers.ops.fmha.attn_bias")
    lengths_of: Any = bias._SeqLenInfo

    def attend(q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, *rest: Any) -> Tensor:
        longest_q, longest_k, causal, scale = rest
        # Built from the device tensor: the public `from_seqlens` needs lengths on the host and would synchronize.
        queries, keys = (
            lengths_of(seqstart=bounds, max_seqlen=longest, min_seqlen=1, seqstart_py=[])
            for bounds, longest in ((of_q, longest_q), (of_k, longest_k))
        )
        # Without "FromBottomRight" the mask is aligned at the start. For equal lengths the two are the same mask.
        kind = bias.BlockDiagonalCausalFromBottomRightMask if causal else bias.BlockDiagonalMask
        mask = kind(q_seqinfo=queries, k_seqinfo=keys)
        groups = k.shape[1]
        q5 = q.unflatten(1, (groups, -1))
        k5, v5 = (t.unsqueeze(2).expand(-1, -1, q5.shape[2], -1) for t in (k, v))
        out = fmha.memory_efficient_attention(q5[None], k5[None], v5[None], attn_bias=mask, scale=scale)
        return out[0].flatten(1, 2)

    return attend


def _varlen_attn() -> Callable[..., Tensor]:
    from inspect import signature

    function = import_module("torch.nn.attention.varlen").varlen_attn
    parameters = signature(function).parameters
    windowed, grouped = "window_size" in parameters, "enable_gqa" in parameters

    def attend(q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, *rest: Any) -> Tensor:
        longest_q, longest_k, causal, scale = rest
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
        return function(q, k, v, of_q, of_k, longest_q, longest_k, **options)

    return attend


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, _longest: int, _longest_k: int, causal: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    bounds, key_bounds = tuple(of_q.tolist()), tuple(of_k.tolist()) if of_k is not of_q else None
    for name, ends, rows in (("cu_seqlens", bounds, q), ("cu_seqlens_kv", key_bounds or bounds, k)):
        if ends[:1] != (0,) or ends[-1] != rows.shape[0] or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"packed_attention: {name} must rise from 0 to the number of rows, {rows.shape[0]}")
    if q.shape[0] == 0:
        return q * (k.sum() + v.sum())  # empty, but still part of the autograd graph of all three inputs
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    groups, order = _plan(bounds, key_bounds or bounds, q.shape[1] * q.shape[2], causal)
    parts = [_attend_group(q, k, v, group, causal, scale) for group in groups]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out if order is None else out.index_select(0, order.to(q.device))


class _Group(NamedTuple):
    """Documents that share an SDPA call.

    documents      their number B
    queries, keys  (B * M,) and (B * N,) gathered rows of q and of k, v
    last_key       (B, 1, M, 1) the last of the N keys that a query attends to, where a document has more keys than
                   queries and attention is causal; else None. The mask would be N times as large, and plans are kept
    real           positions of the real queries among the B * M, None if all are
    """

    documents: int
    queries: Tensor
    keys: Tensor
    last_key: Tensor | None
    real: Tensor | None


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: _Group, causal: bool, scale: float) -> Tensor:
    queries = group.queries.to(q.device)
    keys = queries if group.keys is group.queries else group.keys.to(q.device)
    qs, ks, vs = (
        t.index_select(0, rows).view(group.documents, -1, *t.shape[1:]).transpose(1, 2)
        for t, rows in ((q, queries), (k, keys), (v, keys))
    )
    mask = None
    if group.last_key is not None:
        mask = torch.arange(ks.shape[2], device=q.device) <= group.last_key.to(q.device)  # (B, 1, M, N)
    # The padding of a document repeats its last token: all scores stay finite, and the padding's gradients are zero.
    out = F.scaled_dot_product_attention(qs, ks, vs, mask, is_causal=causal and mask is None, scale=scale)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if group.real is None else out.index_select(0, group.real.to(q.device))


@lru_cache(maxsize=64)
def _plan(
    bounds: tuple[int, ...], key_bounds: tuple[int, ...], width: int, causal: bool
) -> tuple[list[_Group], Tensor | None]:
    """Batches of documents, those with most keys first.

    The second result is the index that undoes the sorting (None if the order has not changed).
    """
    starts, key_starts = bounds[:-1], key_bounds[:-1]
    queries, keys = ([b - a for a, b in itertools.pairwise(ends)] for ends in (bounds, key_bounds))
    documents = sorted((d for d, n in enumerate(queries) if n), key=lambda d: (-keys[d], -queries[d], d))
    if any((queries[d] if causal else 1) > keys[d] for d in documents):
        raise ValueError("packed_attention: a document has fewer keys than queries, or none")
    groups: list[_Group] = []
    for batch in _batches(documents, queries, keys, width, causal):
        first_query, m, first_key, n = (
            torch.tensor([values[d] for d in batch])[:, None] for values in (starts, queries, key_starts, keys)
        )
        query, key = torch.arange(int(m.max())), torch.arange(int(n.max()))
        rows = (first_query + query.minimum(m - 1)).flatten()
        key_rows = rows if bounds == key_bounds else (first_key + key.minimum(n - 1)).flatten()
        last_key = None
        if causal and not torch.equal(m, n):
            last_key = (n - m + query).minimum(n - 1)[:, None, :, None]
        real = (query < m).flatten()
        groups.append(
            _Group(len(batch), rows, key_rows, last_key, None if bool(real.all()) else real.nonzero().flatten())
        )
    visited = torch.cat([torch.arange(starts[d], starts[d] + queries[d]) for d in documents])
    order = visited.argsort()
    return groups, None if torch.equal(order, torch.arange(len(order))) else order


def _batches(documents: list[int], queries: list[int], keys: list[int], width: int, causal: bool) -> list[list[int]]:
    """Documents that are padded to one shape, where padding takes less time than one more call."""
    batches: list[list[int]] = []
    for d in documents:
        last = batches[-1] if batches else []
        most, longest = max((queries[i] for i in last), default=0), keys[last[0]] if last else 0
        area = longest * max(most, queries[d]) * (len(last) + 1)
        waste = width * (area - longest * most * len(last) - queries[d] * keys[d])
        # Without a causal mask queries would attend to the padding, so only documents of equal length share a call.
        equal = keys[d] == longest and queries[d] == most
        if last and (equal or (causal and waste < _CALL_COST)):
            last.append(d)
        else:
            batches.append([d])
    return batches
