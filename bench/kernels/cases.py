"""The implementations that the kernel benchmarks run: our ops and the peers that can be imported.

All implementations of a case do the same work: a forward and a backward pass that return the loss and the gradients of
the case. A peer that cannot do this work, for example without label smoothing, raises ImportError.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pite_kernels
import pite_kernels.reference
from bench.kernels.inputs import DOCUMENT, RANK, Inputs
from bench.measure import Step
from pite_kernels import attention


def trajectory_ours(x: Inputs) -> Step:
    def step() -> list[Tensor]:
        loss = pite_kernels.trajectory_l1(x.hidden, x.weight, x.bias, x.targets, x.rows)
        return x.gradients(loss, x.hidden, x.weight, x.bias)

    return step


def _dense_l1(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    distance = (F.linear(hidden, weight, bias).view_as(targets).to(wide) - targets).abs()
    present = targets != -1
    return (distance * present).sum() / present.sum()


def trajectory_eager(x: Inputs, function: Callable[..., Tensor] = _dense_l1) -> Step:
    targets = x.dense_targets
    return lambda: x.gradients(function(x.hidden, x.weight, x.bias, targets), x.hidden, x.weight, x.bias)


def trajectory_gathered(x: Inputs, function: Callable[..., Tensor] = _dense_l1) -> Step:
    """Plain PyTorch on gathered rows."""

    def step() -> list[Tensor]:
        loss = function(x.supervised, x.weight, x.bias, x.targets)
        return x.gradients(loss, x.hidden, x.weight, x.bias)

    return step


def trajectory_compiled(x: Inputs) -> Step:
    return trajectory_gathered(x, torch.compile(_dense_l1, dynamic=False))


def cross_entropy_ours(x: Inputs) -> Step:
    def step() -> list[Tensor]:
        loss = pite_kernels.linear_cross_entropy(x.hidden, x.weight, x.ids, x.rows, label_smoothing=x.case.smoothing)
        return x.gradients(loss, x.hidden, x.weight)

    return step


def _dense_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def cross_entropy_eager(x: Inputs, function: Callable[..., Tensor] = _dense_cross_entropy) -> Step:
    labels = x.labels
    return lambda: x.gradients(function(x.hidden, x.weight, labels, x.case.smoothing), x.hidden, x.weight)


def cross_entropy_gathered(x: Inputs, function: Callable[..., Tensor] = _dense_cross_entropy) -> Step:
    """Peers run on gathered rows, as a careful user would do: ignored rows would go through their GEMMs."""

    def step() -> list[Tensor]:
        loss = function(x.supervised, x.weight, x.ids, x.case.smoothing)
        return x.gradients(loss, x.hidden, x.weight)

    return step


def cross_entropy_compiled(x: Inputs) -> Step:
    return cross_entropy_gathered(x, torch.compile(_dense_cross_entropy, dynamic=False))


def cross_entropy_torch(x: Inputs) -> Step:
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError("torch.nn.functional has no linear_cross_entropy")
    return cross_entropy_gathered(
        x, lambda hidden, weight, labels, eps: function(hidden, weight, labels, label_smoothing=eps)
    )


def cross_entropy_liger(x: Inputs) -> Step:
    _needs_gpu(x)
    module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(label_smoothing=x.case.smoothing)
    return cross_entropy_gathered(x, lambda hidden, weight, labels, _: loss(weight, hidden, labels))


def cross_entropy_cut(x: Inputs) -> Step:
    _needs_gpu(x)
    _needs_no_smoothing(x)
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return cross_entropy_gathered(x, lambda hidden, weight, labels, _: function(hidden, weight, labels))


def cross_entropy_quack(x: Inputs) -> Step:
    _needs_gpu(x)
    _needs_no_smoothing(x)
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return cross_entropy_gathered(x, lambda hidden, weight, labels, _: function(hidden, weight, labels))


def _needs_gpu(x: Inputs) -> None:
    if not x.hidden.is_cuda:
        raise ImportError("needs a GPU")


def _needs_no_smoothing(x: Inputs) -> None:
    if x.case.smoothing:
        raise ImportError("has no label smoothing")


def lora_ours(x: Inputs) -> Step:
    splits = [x.case.depth] * 3

    def step() -> list[Tensor]:
        y = pite_kernels.lora_linear(x.hidden, x.weight, x.lora_a, x.lora_b, scale=2.0, splits=splits)
        return x.gradients(y, x.hidden, x.lora_a, x.lora_b, upstream=x.upstream)

    return step


def lora_eager(x: Inputs) -> Step:
    def step() -> list[Tensor]:
        parts = zip(x.weight.chunk(3), x.lora_a.chunk(3), x.lora_b.chunk(3))
        y = torch.cat([F.linear(x.hidden, w) + 2.0 * F.linear(F.linear(x.hidden, a), b) for w, a, b in parts], -1)
        return x.gradients(y, x.hidden, x.lora_a, x.lora_b, upstream=x.upstream)

    return step


def lora_peft(x: Inputs) -> Step:
    peft = import_module("peft")
    holder = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in "qkv"})
    frozen: list[Any] = list(holder.values())
    for layer, weight in zip(frozen, x.weight.chunk(3)):
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.in_features = layer.out_features = x.case.depth
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list("qkv"))
    peft.inject_adapter_in_model(config, holder)
    layers: list[Any] = list(holder.values())
    for layer, a, b in zip(layers, x.lora_a.chunk(3), x.lora_b.chunk(3)):
        layer.lora_A["default"].weight = torch.nn.Parameter(a.detach().clone())
        layer.lora_B["default"].weight = torch.nn.Parameter(b.detach().clone())

    def step() -> list[Tensor]:
        y = torch.cat([layer(x.hidden) for layer in layers], -1)
        trainable = [
            x.hidden,
            *(layer.lora_A["default"].weight for layer in layers),
            *(layer.lora_B["default"].weight for layer in layers),
        ]
        y, dx, *rest = x.gradients(y, *trainable, upstream=x.upstream)
        return [y, dx, torch.cat(rest[:3]), torch.cat(rest[3:])]

    return step


def lora_concatenated(x: Inputs) -> Step:
    """A candidate, not in pite_kernels: y = [x | s x A'] [W | B]', one forward GEMM; W is stored with columns for B.

    It saves reading and writing y, but copies x and multiplies the zeros between the B of the parts.
    """
    d, extra = x.case.depth, 3 * RANK
    wide_weight = torch.cat([x.weight, x.weight.new_zeros(3 * d, extra)], 1)

    def step() -> list[Tensor]:
        with torch.no_grad():
            hidden, a, b = x.hidden, x.lora_a, x.lora_b
            wide = hidden.new_empty(hidden.shape[0], d + extra)
            wide[:, :d] = hidden
            torch.mm(hidden, a.t(), out=wide[:, d:])
            wide[:, d:] *= 2.0
            for i, part in enumerate(b.chunk(3)):
                wide_weight[i * d : (i + 1) * d, d + i * RANK : d + (i + 1) * RANK] = part
            y = torch.mm(wide, wide_weight.t())
            parts = x.upstream.chunk(3, 1)
            low = torch.cat([torch.mm(g, part) for g, part in zip(parts, b.chunk(3))], 1).mul_(2.0)
            dx = torch.mm(x.upstream, x.weight).addmm_(low, a)
            columns = wide[:, d:].chunk(3, 1)
            db = torch.cat([torch.mm(g.t(), u) for g, u in zip(parts, columns)])
            return [y, dx, torch.mm(low.t(), hidden), db]

    return step


def lora_low_rank_last(x: Inputs) -> Step:
    """A candidate, not in pite_kernels: the thin GEMMs accumulate onto the large ones; dY is read twice more."""
    splits = [x.case.depth] * 3

    def step() -> list[Tensor]:
        with torch.no_grad():
            low = torch.mm(x.hidden, x.lora_a.t()).mul_(2.0)
            y, parts = torch.mm(x.hidden, x.weight.t()), x.upstream.split(splits, 1)
            factors = list(zip(low.split(RANK, 1), x.lora_b.split(splits)))
            for part, (low_i, b_i) in zip(y.split(splits, 1), factors):
                part.addmm_(low_i, b_i.t())
            grad_low = torch.cat([torch.mm(g, b_i) for g, (_, b_i) in zip(parts, factors)], 1).mul_(2.0)
            dx = torch.mm(x.upstream, x.weight).addmm_(grad_low, x.lora_a)
            db = torch.cat([torch.mm(g.t(), low_i) for g, (low_i, _) in zip(parts, factors)])
            return [y, dx, torch.mm(grad_low.t(), x.hidden), db]

    return step


def lora_bare(x: Inputs) -> Step:
    """Only the two GEMMs of the frozen layer: the baseline for the overhead of LoRA, not a peer."""
    return lambda: [torch.mm(x.hidden.detach(), x.weight.t()), torch.mm(x.upstream, x.weight)]


def rope_step(rotate: Callable[[Tensor, Inputs], tuple[Tensor, ...]]) -> Callable[[Inputs], Step]:
    """A step on a copy of the fused projection, because ours overwrites its input."""

    def build(x: Inputs) -> Step:
        def step() -> list[Tensor]:
            q, k, v = rotate(x.fused.clone(), x)
            return [q, k, *torch.autograd.grad((q, k, v), x.fused, x.upstreams)]

        return step

    return build


def _rope_ours(fused: Tensor, x: Inputs) -> tuple[Tensor, ...]:
    return pite_kernels.rope_qkv(fused, *x.tables, head_dim=x.tables[0].shape[1], key_heads=x.upstreams[0].shape[1])


def _rope_apart(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Inputs], tuple[Tensor, ...]]:
    def split(fused: Tensor, x: Inputs) -> tuple[Tensor, ...]:
        q, k, v = fused.unflatten(-1, (-1, x.tables[0].shape[1])).chunk(3, 1)
        return *rotate(q, k, *x.tables), v

    return split


def rope_liger(x: Inputs) -> Step:
    _needs_gpu(x)
    import_module("liger_kernel.ops")
    return rope_step(_rope_apart(pite_kernels.apply_rope))(x)


def attention_documents(x: Inputs) -> Step:
    """One SDPA call per document."""

    def step() -> list[Tensor]:
        q, k, v = x.qkv
        out = pite_kernels.reference.packed_attention(q, k, v, x.bounds, DOCUMENT)
        return x.gradients(out, q, k, v, upstream=x.upstream)

    return step


def attention_step(backend: str) -> Callable[[Inputs], Step]:
    def build(x: Inputs) -> Step:
        if backend != "auto":
            _needs_gpu(x)

        def step() -> list[Tensor]:
            q, k, v = x.qkv
            out = pite_kernels.packed_attention(q, k, v, x.bounds, DOCUMENT, backend=backend)
            return x.gradients(out, q, k, v, upstream=x.upstream)

        return step

    return build


OURS, PLAIN, BARE = "ours", "eager", "bare GEMMs"
CANDIDATES = ("K-concatenated", "low-rank term last")  # other forms of our op, not peers
IMPLEMENTATIONS: dict[str, dict[str, Callable[[Inputs], Step]]] = {
    "trajectory": {
        OURS: trajectory_ours,
        PLAIN: trajectory_eager,
        "eager, rows gathered": trajectory_gathered,
        "torch.compile, rows gathered": trajectory_compiled,
    },
    "cross_entropy": {
        OURS: cross_entropy_ours,
        PLAIN: cross_entropy_eager,
        "eager, rows gathered": cross_entropy_gathered,
        "torch.compile, rows gathered": cross_entropy_compiled,
        "F.linear_cross_entropy": cross_entropy_torch,
        "liger-kernel": cross_entropy_liger,
        "cut-cross-entropy": cross_entropy_cut,
        "quack-kernels": cross_entropy_quack,
    },
    "lora": {
        OURS: lora_ours,
        PLAIN: lora_eager,
        "peft": lora_peft,
        **dict(zip(CANDIDATES, (lora_concatenated, lora_low_rank_last))),
        BARE: lora_bare,
    },
    "rope": {
        OURS: rope_step(_rope_ours),
        PLAIN: rope_step(_rope_apart(pite_kernels.reference.apply_rope)),
        "liger-kernel": rope_liger,
    },
    "attention": {
        OURS: attention_step("auto"),
        PLAIN: attention_documents,
        **{name: attention_step(name) for name in attention.BACKENDS[:-1]},
    },
}
