"""Rotary embedding of a fused q, k, v projection, in place.

Rotated copies of q and k would be one ninth of the activations that a 7B Llama layer keeps for backward, and copying
takes as long as rotating. Backward writes the three gradients into one fused tensor, the layout that the backward pass
of the projection needs. This is an autograd function, because an operator of torch.library cannot both overwrite an
input and have a gradient. Under torch.compile the plain PyTorch version is used, which the compiler fuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pite_kernels import reference
from pite_kernels.dispatch import uses_triton, with_unit_stride
from pite_kernels.elementwise import rms_norm
from pite_kernels.rows import RowIndex, gather_rows, sum_rows


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    key_heads: int,
    kv_rows: RowIndex | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads and rotate q and k by position (Su et al. 2021, in Llama's half-split form).

    qkv        (T, (H + 2 K) * D)  H heads of q, then K of k and K of v; contiguous. On CUDA it is overwritten: it must
                                   not be used again, nor be saved for backward by the op that produced it
    cos, sin   (T, D)              from `rope_tables`, which has M-RoPE too; without gradients
    head_dim, key_heads            D, K
    kv_rows    rows of k and v to gather (n of them), as in `packed_attention`; None for all in order (n = T)
    norms      weights (D,) of q's and k's root-mean-square norm over each head, before the rotation, as in Qwen3; with
               `eps`, computed in qkv's dtype. q and k then have memory of their own; the norms are kernels of their own
    Returns q (T, H, D), k (n, K, D) and v (n, K, D). On CUDA they are views of qkv, or with kv_rows new tensors, so that
    nothing keeps the rows of k and v that were copied. Raises ValueError on other shapes.
    """
    heads, rest = divmod(qkv.shape[-1], head_dim)
    queries = heads - 2 * key_heads
    if qkv.dim() != 2 or rest or head_dim % 2 or queries <= 0 or queries % key_heads:
        raise ValueError(f"rope_qkv: {tuple(qkv.shape)} does not hold q, k, v of {head_dim} with {key_heads} key heads")
    if norms is None:
        return _rope(qkv, cos, sin, head_dim, key_heads, kv_rows)
    if [tuple(weight.shape) for weight in norms] != [(head_dim,)] * 2:
        raise ValueError(f"rope_qkv: norms must be two weights of {head_dim}, not {[tuple(w.shape) for w in norms]}")
    q, kv = qkv.split([queries * head_dim, 2 * key_heads * head_dim], 1)
    q = rope_q(q, cos, sin, head_dim=head_dim, norm=norms[0], eps=eps)
    return q, *rope_kv(kv, cos, sin, head_dim=head_dim, kv_rows=kv_rows, norm=norms[1], eps=eps)


def rope_q(
    q: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, norm: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """`rope_qkv` of queries alone: q (T, H * D) to (T, H, D); on CUDA in place, or with the weight `norm` (D,) a copy."""
    if norm is not None:
        q = rms_norm(q.unflatten(-1, (-1, head_dim)), norm.to(q.dtype), eps=eps).flatten(1)
    return _rope(q, cos, sin, head_dim, 0, None)[0]


def rope_kv(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    kv_rows: RowIndex | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`rope_qkv` of keys and values alone: kv (T, 2 K * D) to k and v (n, K, D); `norm` (D,) is the weight of k's norm."""
    if norm is None:
        return _rope(kv, cos, sin, head_dim, kv.shape[-1] // (2 * head_dim), kv_rows)[1:]
    k, v = kv.chunk(2, 1)
    k, v = rope_q(k, cos, sin, head_dim=head_dim, norm=norm, eps=eps), v.unflatten(-1, (-1, head_dim))
    return (k, v) if kv_rows is None else (gather_rows(k, kv_rows), gather_rows(v, kv_rows))


def _rope(
    x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, key_heads: int, index: RowIndex | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_qkv` where q, or k and v, may have no heads."""
    if cos.shape != (x.shape[0], head_dim) or sin.shape != cos.shape:
        raise ValueError(f"rope_qkv: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {len(x)} x {head_dim}")
    # torch.compile fuses the plain version with the ops around it.
    if uses_triton(x) and not torch.compiler.is_compiling():
        if not x.is_contiguous():
            raise ValueError("rope_qkv: qkv must be contiguous, since it is overwritten")
        if index is None:
            return _Rope.apply(x, cos, sin, head_dim, key_heads)
        return _RopeAndGather.apply(x, cos, sin, head_dim, key_heads, *index)
    heads = x.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], 1)
    q, k = reference.apply_rope(q, k, cos, sin)
    return (q, k, v) if index is None else (q, gather_rows(k, index), gather_rows(v, index))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, key_heads: int) -> tuple[Tensor, ...]:
        from pite_kernels.gpu.rope import rotate

        # If another op saved the projection's output for its backward, autograd raises instead of using wrong values.
        torch.autograd.graph.increment_version(qkv)
        cos, sin = cos.contiguous(), sin.contiguous()
        heads = qkv.unflatten(-1, (-1, head_dim))
        rotated = heads[:, : heads.shape[1] - key_heads]
        with torch.cuda.device_of(qkv):
            rotate(rotated, rotated, cos, sin, back=False)
        ctx.save_for_backward(cos, sin)
        return heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from pite_kernels.gpu.rope import rotate

        cos, sin = ctx.saved_tensors
        whole, (q, k, v) = _fused_like(grads, len(cos))
        with torch.cuda.device_of(whole):
            for grad, out in zip(grads, (q, k)):
                rotate(with_unit_stride(grad), out, cos, sin, back=True)
            v.copy_(grads[2])
        return whole.flatten(1), None, None, None, None


class _RopeAndGather(torch.autograd.Function):
    """q, and each copy of k and v, in memory of their own: the fused projection is freed after this."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, key_heads: int,
        rows: Tensor, inverse: Tensor, offsets: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        from pite_kernels.gpu.rope import rotate

        cos, sin = cos.contiguous(), sin.contiguous()
        heads = qkv.unflatten(-1, (-1, head_dim))
        q, k, v = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], 1)
        out_q, out_k = q.new_empty(q.shape), k.new_empty(len(rows), *k.shape[1:])
        with torch.cuda.device_of(qkv):
            rotate(q, out_q, cos, sin, back=False)
            rotate(k, out_k, cos, sin, back=False, rows=rows)
        ctx.save_for_backward(cos, sin, inverse, offsets)
        return out_q, out_k, v.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from pite_kernels.gpu.rope import rotate, sum_and_rotate_back

        cos, sin, inverse, offsets = ctx.saved_tensors
        whole, (q, k, v) = _fused_like(grads, len(cos))
        with torch.cuda.device_of(whole):
            rotate(with_unit_stride(grads[0]), q, cos, sin, back=True)
            sum_and_rotate_back(grads[1].contiguous(), inverse, offsets, cos, sin, k)
            sum_rows(grads[2], inverse, offsets, v)
        return whole.flatten(1), *[None] * 7


def _fused_like(grads: tuple[Tensor, ...], count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The fused gradient (T, H + 2 K, D), to be filled, and its parts."""
    heads = [grad.shape[1] for grad in grads]
    whole = grads[0].new_empty(count, sum(heads), grads[0].shape[2])
    return whole, whole.split(heads, 1)
