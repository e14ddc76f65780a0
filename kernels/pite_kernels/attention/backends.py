"""The back ends of packed attention under one signature:

attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale) -> (T, H, D)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pite_kernels.attention.sdpa import batched_sdpa

FLASH_2, FLASH_3, FLASH_4 = "flash_attn", "flash_attn_interface", "flash_attn.cute"
"""flash-attn's modules: version 2, version 3 (Hopper) and version 4 (CuTe)."""

BACKENDS = (FLASH_3, FLASH_4, FLASH_2, "xformers", "varlen_attn", "sdpa")

Attend = Callable[..., Tensor]

# A plain dictionary, so that torch.compile can read it.
_loaded: dict[str, Attend] = {}


def by_preference(device: torch.device) -> tuple[str, ...]:
    """BACKENDS without SDPA, the fastest on this device first.

    Version 3 is written for Hopper, version 4 for Blackwell; version 4 also compiles its kernels at the first call. On
    older GPUs version 2 is the best tested.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    flash = {8: (FLASH_2, FLASH_3, FLASH_4), 9: (FLASH_3, FLASH_4, FLASH_2)}.get(major, (FLASH_4, FLASH_2, FLASH_3))
    return *flash, *BACKENDS[3:-1]


def load(name: str) -> Attend:
    """The back end of this name. Raises ValueError, with the reason, if it is not usable here."""
    function = _loaded.get(name)
    if function is None:
        function = _loaded[name] = _import(name)
    return function


def _import(name: str) -> Attend:
    loaders: dict[str, Callable[[], Attend]] = {
        **{module: partial(_flash_attn, module) for module in (FLASH_2, FLASH_3, FLASH_4)},
        "xformers": _xformers,
        "varlen_attn": _varlen_attn,
        "sdpa": lambda: batched_sdpa,
    }
    if name not in loaders:
        raise ValueError(f"packed_attention: unknown backend {name!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    try:
        return loaders[name]()
    except Exception as error:  # a package built for another torch or device may raise anything
        raise ValueError(f"packed_attention: backend {name!r} is not usable here: {error}") from error


def _flash_attn(module: str) -> Attend:
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
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out[0] if isinstance(out, tuple) else out  # 3 and 4 may return (out, lse)

    return attend


def _xformers() -> Attend:
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
        # In its layout for grouped queries no operator of xformers has a backward pass.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if t.shape[1] != q.shape[1] else t for t in (k, v))
        return fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]

    return attend


def _varlen_attn() -> Attend:
    # Its backward pass follows torch.use_deterministic_algorithms by itself; xformers refuses to run under it.
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
