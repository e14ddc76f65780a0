"""What the kernel benchmarks run: shapes, inputs, our ops and whichever peers import.

Every implementation does the same job: a forward and a backward pass that end in the loss and the gradients the case
asks for. A peer that cannot do the job (no smoothing, say) is not listed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import kernels.reference
from bench.measure import Step

POINTS, FRAMES, RANK = 3, 100, 64
DOCUMENT = 204  # tokens of a typical sample: 100 frames, a question, an answer


@dataclass(frozen=True)
class Case:
    """One benchmark: `op` at a shape. fraction: rows that carry a target, of all T."""

    op: str
    tokens: int
    depth: int
    fraction: float = 1.0
    vocabulary: int = 32000
    frozen: bool = True
    smoothing: float = 0.1
    dtype: torch.dtype = torch.bfloat16

    @property
    def rows(self) -> int:
        return round(self.tokens * self.fraction)

    @property
    def outputs(self) -> int:
        return POINTS * FRAMES * 2 if self.op == "trajectory" else self.vocabulary

    @property
    def name(self) -> str:
        details = [f"T={self.tokens}", f"d={self.depth}"]
        if self.op in ("trajectory", "cross_entropy"):
            details.append(f"{self.fraction:.0%} of rows")
        if self.op == "cross_entropy":
            details += [f"V={self.vocabulary}", "frozen" if self.frozen else "trainable", f"smoothing {self.smoothing}"]
        return f"{self.op}: " + ", ".join(details)

    @property
    def work(self) -> tuple[float, float]:
        """(FLOPs, bytes) no implementation can do without, for `Roofline.floor`."""
        size = self.dtype.itemsize
        if self.op == "lora":
            # Three stacked square layers: y and dX through W, and the four thin products of A and B.
            flops = 4 * self.tokens * self.depth * 3 * self.depth + 6 * self.tokens * 2 * self.depth * 3 * RANK
            return flops, size * (self.tokens * self.depth * 8 + 6 * self.depth**2)
        if self.op == "attention":
            return 7 * self.tokens * DOCUMENT * self.depth, size * 8 * self.tokens * self.depth
        gemms = 3 if self.op == "trajectory" or not self.frozen else 2
        return 2.0 * gemms * self.rows * self.depth * self.outputs, size * (2 * self.rows + self.tokens) * self.depth


class Inputs:
    """Random inputs of a case, made when first needed; `double` gives the same numbers in float64."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        g = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, device=device) * scale).to(case.dtype)

        d = case.depth
        self.hidden = normal(case.tokens, d).requires_grad_()
        self.rows = torch.randperm(case.tokens, generator=g, device=device)[: case.rows].sort().values
        if case.op == "trajectory":
            self.weight = normal(case.outputs, d, scale=0.1 * d**-0.5).requires_grad_()
            self.bias = normal(case.outputs, scale=0.1).requires_grad_()
            # Two away from every prediction: a sign must not hang on rounding in the correctness check.
            self.targets = torch.rand(case.rows, POINTS, FRAMES, 2, generator=g, device=device) + 2
            self.targets[torch.rand(case.rows, POINTS, FRAMES, generator=g, device=device) < 0.3] = -1
        elif case.op == "cross_entropy":
            self.weight = normal(case.outputs, d, scale=d**-0.5).requires_grad_(not case.frozen)
            self.ids = torch.randint(0, case.outputs, (case.rows,), generator=g, device=device)
        elif case.op == "lora":
            self.weight = normal(3 * d, d, scale=d**-0.5)
            self.lora_a = normal(3 * RANK, d, scale=d**-0.5).requires_grad_()
            self.lora_b = normal(3 * d, RANK, scale=RANK**-0.5).requires_grad_()
            self.upstream = normal(case.tokens, 3 * d)
        elif case.op == "attention":
            heads = max(1, d // 128)
            self.qkv = [normal(case.tokens, heads, d // heads).requires_grad_() for _ in range(3)]
            bounds = [*range(0, case.tokens, DOCUMENT), case.tokens]
            self.bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
            self.upstream = normal(case.tokens, heads, d // heads)

    def double(self) -> Inputs:
        twin = object.__new__(Inputs)
        for name, value in vars(self).items():
            twin.__dict__[name] = [_double(t) for t in value] if isinstance(value, list) else _double(value)
        return twin

    @cached_property
    def dense_targets(self) -> Tensor:
        full = torch.full((self.case.tokens, POINTS, FRAMES, 2), -1.0, device=self.device, dtype=self.targets.dtype)
        return full.index_copy(0, self.rows, self.targets)

    @cached_property
    def labels(self) -> Tensor:
        return torch.full((self.case.tokens,), -100, device=self.device).index_copy(0, self.rows, self.ids)

    def gradients(self, value: Tensor, *learned: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
        return [value, *torch.autograd.grad(value, [t for t in learned if t.requires_grad], upstream)]


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def trajectory_ours(x: Inputs) -> Step:
    def step() -> list[Tensor]:
        loss = kernels.trajectory_l1(x.hidden, x.weight, x.bias, x.targets, x.rows)
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


def trajectory_compiled(x: Inputs) -> Step:
    return trajectory_eager(x, torch.compile(_dense_l1))


def trajectory_gathered(x: Inputs) -> Step:
    """Eager PyTorch that at least gathers its rows first."""

    def step() -> list[Tensor]:
        loss = _dense_l1(x.hidden[x.rows], x.weight, x.bias, x.targets)
        return x.gradients(loss, x.hidden, x.weight, x.bias)

    return step


def cross_entropy_ours(x: Inputs) -> Step:
    def step() -> list[Tensor]:
        loss = kernels.linear_cross_entropy(x.hidden, x.weight, x.ids, x.rows, label_smoothing=x.case.smoothing)
        return x.gradients(loss, x.hidden, x.weight)

    return step


def _dense_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def cross_entropy_eager(x: Inputs, function: Callable[..., Tensor] = _dense_cross_entropy) -> Step:
    labels = x.labels
    return lambda: x.gradients(function(x.hidden, x.weight, labels, x.case.smoothing), x.hidden, x.weight)


def cross_entropy_compiled(x: Inputs) -> Step:
    return cross_entropy_eager(x, torch.compile(_dense_cross_entropy))


def cross_entropy_gathered(x: Inputs) -> Step:
    def step() -> list[Tensor]:
        loss = _dense_cross_entropy(x.hidden[x.rows], x.weight, x.ids, x.case.smoothing)
        return x.gradients(loss, x.hidden, x.weight)

    return step


def cross_entropy_torch(x: Inputs) -> Step:
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError("torch.nn.functional has no linear_cross_entropy")
    return cross_entropy_eager(
        x, lambda hidden, weight, labels, eps: function(hidden, weight, labels, label_smoothing=eps)
    )


def cross_entropy_liger(x: Inputs) -> Step:
    _needs_gpu(x)
    module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(label_smoothing=x.case.smoothing)
    return cross_entropy_eager(x, lambda hidden, weight, labels, _: loss(weight, hidden, labels))


def cross_entropy_cut(x: Inputs) -> Step:
    _needs_gpu(x)
    _needs_no_smoothing(x)
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return cross_entropy_eager(x, lambda hidden, weight, labels, _: function(hidden, weight, labels))


def cross_entropy_quack(x: Inputs) -> Step:
    _needs_gpu(x)
    _needs_no_smoothing(x)
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return cross_entropy_eager(x, lambda hidden, weight, labels, _: function(hidden, weight, labels))


def _needs_gpu(x: Inputs) -> None:
    if not x.hidden.is_cuda:
        raise ImportError("needs a GPU")


def _needs_no_smoothing(x: Inputs) -> None:
    if x.case.smoothing:
        raise ImportError("cannot smooth labels")


def lora_ours(x: Inputs) -> Step:
    splits = [x.case.depth] * 3

    def step() -> list[Tensor]:
        y = kernels.lora_linear(x.hidden, x.weight, x.lora_a, x.lora_b, scale=2.0, splits=splits)
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
        learned = [
            x.hidden,
            *(layer.lora_A["default"].weight for layer in layers),
            *(layer.lora_B["default"].weight for layer in layers),
        ]
        y, dx, *rest = x.gradients(y, *learned, upstream=x.upstream)
        return [y, dx, torch.cat(rest[:3]), torch.cat(rest[3:])]

    return step


def lora_concatenated(x: Inputs) -> Step:
    """A candidate, not in `kernels`: y = [x | s x A'] [W | B]', one forward GEMM, W kept with spare columns for B.

    It saves reading and writing y, and pays by copying x and multiplying the zeros between the parts' B.
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


def lora_bare(x: Inputs) -> Step:
    """The frozen layer's two GEMMs alone: the price LoRA is measured against, not a peer."""
    return lambda: [torch.mm(x.hidden.detach(), x.weight.t()), torch.mm(x.upstream, x.weight)]


def attention_documents(x: Inputs) -> Step:
    """One SDPA call per document."""

    def step() -> list[Tensor]:
        q, k, v = x.qkv
        out = kernels.reference.packed_attention(q, k, v, x.bounds, DOCUMENT)
        return x.gradients(out, q, k, v, upstream=x.upstream)

    return step


def attention_step(backend: str) -> Callable[[Inputs], Step]:
    def build(x: Inputs) -> Step:
        if backend != "auto":
            _needs_gpu(x)

        def step() -> list[Tensor]:
            q, k, v = x.qkv
            out = kernels.packed_attention(q, k, v, x.bounds, DOCUMENT, backend=backend)
            return x.gradients(out, q, k, v, upstream=x.upstream)

        return step

    return build


OURS, PLAIN, BARE, CANDIDATE = "ours", "eager", "bare GEMMs", "K-concatenated"
IMPLEMENTATIONS: dict[str, dict[str, Callable[[Inputs], Step]]] = {
    "trajectory": {
        OURS: trajectory_ours,
        PLAIN: trajectory_eager,
        "eager, rows gathered": trajectory_gathered,
        "torch.compile": trajectory_compiled,
    },
    "cross_entropy": {
        OURS: cross_entropy_ours,
        PLAIN: cross_entropy_eager,
        "eager, rows gathered": cross_entropy_gathered,
        "torch.compile": cross_entropy_compiled,
        "F.linear_cross_entropy": cross_entropy_torch,
        "liger-kernel": cross_entropy_liger,
        "cut-cross-entropy": cross_entropy_cut,
        "quack-kernels": cross_entropy_quack,
    },
    "lora": {
        OURS: lora_ours,
        PLAIN: lora_eager,
        "peft": lora_peft,
        CANDIDATE: lora_concatenated,
        BARE: lora_bare,
    },
    "attention": {
        OURS: attention_step("auto"),
        PLAIN: attention_documents,
        **{name: attention_step(name) for name in ("flash_attn", "xformers", "varlen_attn")},
    },
}


def gpu_cases() -> list[Case]:
    """The real shapes: one packed row of 16,384 tokens of a 7B and a 13B model."""
    depths, fractions = (4096, 5120), (1.0, 0.5, 0.25, 0.1)
    heads = [Case(op, 16384, d, f) for op in ("trajectory", "cross_entropy") for d in depths for f in fractions]
    trainable = [Case("cross_entropy", 16384, 4096, f, frozen=False) for f in (1.0, 0.25)]
    trainable.append(Case("cross_entropy", 16384, 4096, smoothing=0.0))
    return heads + trainable + [Case(op, 16384, d) for op in ("lora", "attention") for d in depths]


def cpu_cases() -> list[Case]:
    """Shapes a CPU runs in a blink, in float32."""
    small = [Case("trajectory", 1024, 512, f, dtype=torch.float32) for f in (1.0, 0.5, 0.25, 0.1)]
    small += [Case("cross_entropy", 512, 256, f, vocabulary=4000, dtype=torch.float32) for f in (1.0, 0.25, 0.1)]
    return [*small, Case("lora", 512, 256, dtype=torch.float32), Case("attention", 1024, 256, dtype=torch.float32)]
