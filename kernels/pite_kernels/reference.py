"""Every op in plain PyTorch: the reference of the tests and the fallback, in any floating dtype up to float64.

Nothing here is fused: full logits, full predictions, one attention call per document. Autograd computes the backward
passes. Each function takes the arguments of the fast function of the same name. Losses are float32 (float64 for
float64 inputs).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pite_kernels.rows import RowIndex


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reciprocal(normalizer: Tensor) -> Tensor:
    """1 / normalizer, and 0 where the normalizer is 0: a batch without targets has loss 0, not NaN."""
    return torch.where(normalizer == 0, torch.zeros_like(normalizer), normalizer.reciprocal())


def trajectory_l1(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    *,
    normalizer: Tensor | None = None,
    absent: str = "skip",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    dtype = accumulator(hidden.dtype)
    targets = targets.to(dtype)
    predictions = F.linear(hidden[rows], weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    distance = (predictions.view_as(targets).to(dtype) - targets).abs()
    counted = torch.ones_like(targets) if absent == "regress" else _present(targets).to(dtype)
    w = torch.ones_like(rows, dtype=dtype) if weights is None else weights.to(dtype)
    losses = w * torch.where(counted > 0, distance, 0).flatten(1).sum(1)
    if reduction == "none":
        return losses
    count = (w * counted.flatten(1).sum(1)).sum() if normalizer is None else normalizer.to(dtype)
    return losses.sum() * reciprocal(count)


def _present(targets: Tensor) -> Tensor:
    return (targets != -1).any(-1, keepdim=True).expand_as(targets)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalizer: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    dtype = accumulator(hidden.dtype)
    selected = hidden if rows is None else hidden[rows]
    logits = F.linear(selected, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)).to(dtype)
    w = torch.ones_like(target_ids, dtype=dtype) if weights is None else weights.to(dtype)
    losses = w * F.cross_entropy(
        logits, target_ids, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    if reduction == "none":
        return losses
    count = torch.where(target_ids == ignore_index, 0, w).sum() if normalizer is None else normalizer
    return losses.sum() * reciprocal(count.to(dtype))


def two_head_loss(
    hidden: Tensor,
    lm_weight: Tensor,
    target_ids: Tensor,
    target_rows: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    trajectory_rows: Tensor,
    *,
    label_smoothing: float,
    weight: float,
    normalizers: tuple[Tensor | None, Tensor | None],
    absent: str = "skip",
) -> tuple[Tensor, Tensor, Tensor]:
    ce = linear_cross_entropy(
        hidden, lm_weight, target_ids, target_rows, label_smoothing=label_smoothing, normalizer=normalizers[0]
    )
    l1 = trajectory_l1(
        hidden, head_weight, head_bias, targets, trajectory_rows, normalizer=normalizers[1], absent=absent
    )
    return ce + weight * l1, ce, l1


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
) -> Tensor:
    if kv_rows is not None:
        k, v = k[kv_rows.rows], v[kv_rows.rows]
    bounds = cu_seqlens.tolist()
    key_bounds = bounds if cu_seqlens_kv is None else cu_seqlens_kv.tolist()
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    documents = []
    for (a, b), (c, d) in zip(itertools.pairwise(bounds), itertools.pairwise(key_bounds)):
        if a == b:
            continue
        parts = (q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1))
        mask = None
        if causal and b - a != d - c:  # SDPA's own mask is aligned at the start, this one at the end
            mask = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).tril(d - c - (b - a))
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=causal and mask is None, scale=scale)
        documents.append(out.transpose(0, 1))
    # Without tokens the result is empty, but still part of the autograd graph of all three inputs.
    return torch.cat(documents) if documents else q * (k.sum() + v.sum())


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *,
    scale: float = 1.0,
    splits: Sequence[int] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    y = F.linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    sizes = [weight.shape[0]] if splits is None else list(splits)
    delta = [F.linear(F.linear(x, a), b) for a, b in zip(lora_a.chunk(len(sizes)), lora_b.split(sizes))]
    return y + scale * torch.cat(delta, -1)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.to(accumulator(x.dtype))
    normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if residual is None else (normed, total)


def rope_tables(
    position_ids: Tensor,
    head_dim: int,
    *,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    wide, device = accumulator(dtype), position_ids.device
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=wide) / head_dim
    if sections is None:
        positions = position_ids[:, None]
    else:
        axes = _interleaved_axes(sections) if interleaved else [a for a, n in enumerate(sections) for _ in range(n)]
        positions = position_ids.t().index_select(1, torch.tensor(axes, device=device))
    angles = positions.to(wide) * theta**-exponents
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _interleaved_axes(sections: Sequence[int]) -> list[int]:
    """The axis of each frequency: in turn, until an axis but the first has had its section; the first has the rest."""
    axes = [0] * sum(sections)
    for axis in range(1, len(sections)):
        stop = sections[axis] * len(sections)
        axes[axis : stop : len(sections)] = [axis] * len(range(axis, stop, len(sections)))
    return axes


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
