"""Attention over packed documents: one function for whichever varlen kernel is installed.

flash-attn, xformers and PyTorch already maintain attention kernels, so this package has none; it gives them one
signature (`backends`). An installed back end may still fail, so a trial chooses one for each kind of call (`choice`);
the caller can also name one. The CPU has no varlen kernel: documents of similar length are padded into a few batched
SDPA calls (`sdpa`).

A document may have more keys than queries: the keys of a prefix that other documents share, and that is computed once.
The mask is then aligned at the end (the last query attends to all keys), as in flash-attn from 2.1 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pite_kernels.attention import backends
from pite_kernels.attention.backends import BACKENDS
from pite_kernels.attention.choice import choose_backend
from pite_kernels.rows import RowIndex, gather_rows

__all__ = ["BACKENDS", "choose_backend", "packed_attention"]


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
    With `torch.use_deterministic_algorithms(True)` the gradients repeat bitwise. By default the kernels of flash-attn and
    xformers add the gradient of q in any order.
    Returns (T, H, D). Raises ValueError on shapes that do not fit or a back end that is not installed.
    """
    if kv_rows is not None:
        if cu_seqlens_kv is None:
            raise ValueError("packed_attention: kv_rows needs cu_seqlens_kv and max_seqlen_kv")
        k, v = gather_rows(k, kv_rows), gather_rows(v, kv_rows)
    rows_fit = k.shape[0] == q.shape[0] or cu_seqlens_kv is not None
    heads_fit = q.dim() == k.dim() == 3 and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    if not heads_fit or k.shape != v.shape or k.shape[2] != q.shape[2] or not rows_fit:
        raise ValueError(f"packed_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"packed_attention: q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
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
    attend = backends.load(name)
    return attend(q, k, v, cu_seqlens, cu_seqlens_kv, max_seqlen, max_seqlen_kv, causal, scale)
