"""Rotary embedding of a fused q, k, v projection, in the projection's own memory.

Rotated copies of q and k would be a ninth of what a 7B Llama layer keeps for backward, and copying costs as much as
rotating. Backward writes the three gradients side by side, which is the layout that the projection's own backward wants.
An autograd function and no operator of torch.library, which has none that overwrite an input and have a gradient: under
torch.compile it is the plain version, for the compiler to fuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pite_kernels import reference
from pite_kernels.dispatch import uses_triton, with_unit_stride


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads and rotate q and k by their positions (Su et al. 2021; half-split as in Llama).

    qkv        (T, (H + 2 K) * D)  q's H heads, then k's and v's K; contiguous. On CUDA it is overwritten, so it must be
                                   nobody else's: neither used again nor saved for backward by what made it
    cos, sin   (T, D)              from `rope_tables`; without gradients
    head_dim, key_heads            D, K
    Returns q (T, H, D), k (T, K, D) and v (T, K, D); on CUDA views of qkv's memory. Raises ValueError on other shapes.
    """
    heads, rest = divmod(qkv.shape[-1], head_dim)
    queries = heads - 2 * key_heads
    if qkv.dim() != 2 or rest or head_dim % 2 or queries <= 0 or queries % key_heads:
        raise ValueError(f"rope_qkv: {tuple(qkv.shape)} does not hold q, k, v of {head_dim} with {key_heads} key heads")
    if cos.shape != (qkv.shape[0], head_dim) or sin.shape != cos.shape:
        raise ValueError(f"rope_qkv: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {len(qkv)} x {head_dim}")
    # torch.compile fuses the plain version with its neighbours.
    if uses_triton(qkv) and not torch.compiler.is_compiling():
        if not qkv.is_contiguous():
            raise ValueError("rope_qkv: qkv must be contiguous, since it is overwritten")
        return _Rope.apply(qkv, cos, sin, head_dim, key_heads)
    q, k, v = qkv.unflatten(-1, (heads, head_dim)).split([queries, key_heads, key_heads], 1)
    return *reference.apply_rope(q, k, cos, sin), v


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, key_heads: int) -> tuple[Tensor, ...]:
        from pite_kernels.gpu.rope import rotate

        # Whoever kept the projection's output for its own backward is told by autograd instead of computing nonsense.
        torch.autograd.graph.increment_version(qkv)
        cos, sin = cos.contiguous(), sin.contiguous()
        heads = qkv.unflatten(-1, (-1, head_dim))
        rotated = heads[:, :-key_heads]
        with torch.cuda.device_of(qkv):
            rotate(rotated, rotated, cos, sin, back=False)
        ctx.save_for_backward(cos, sin)
        return heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from pite_kernels.gpu.rope import rotate

        cos, sin = ctx.saved_tensors
        heads = [grad.shape[1] for grad in grads]
        whole = grads[0].new_empty(len(cos), sum(heads), cos.shape[1])
        q, k, v = whole.split(heads, 1)
        with torch.cuda.device_of(whole):
            for grad, out in zip(grads, (q, k)):
                rotate(with_unit_stride(grad), out, cos, sin, back=True)
            v.copy_(grads[2])
        return whole.flatten(1), None, None, None, None
