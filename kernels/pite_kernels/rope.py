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


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads and rotate q and k by position (Su et al. 2021, in Llama's half-split form).

    qkv        (T, (H + 2 K) * D)  H heads of q, then K of k and K of v; contiguous. On CUDA it is overwritten: it must
                                   not be used again, nor be saved for backward by the op that produced it
    cos, sin   (T, D)              from `rope_tables`; without gradients
    head_dim, key_heads            D, K
    Returns q (T, H, D), k (T, K, D) and v (T, K, D), on CUDA as views of qkv. Raises ValueError on other shapes.
    """
    heads, rest = divmod(qkv.shape[-1], head_dim)
    queries = heads - 2 * key_heads
    if qkv.dim() != 2 or rest or head_dim % 2 or queries <= 0 or queries % key_heads:
        raise ValueError(f"rope_qkv: {tuple(qkv.shape)} does not hold q, k, v of {head_dim} with {key_heads} key heads")
    if cos.shape != (qkv.shape[0], head_dim) or sin.shape != cos.shape:
        raise ValueError(f"rope_qkv: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {len(qkv)} x {head_dim}")
    # torch.compile fuses the plain version with the ops around it.
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

        # If another op saved the projection's output for its backward, autograd raises instead of using wrong values.
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
