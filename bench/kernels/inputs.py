"""The cases of the kernel benchmarks: shapes, FLOPs and bytes, and random inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pite_kernels import rope_tables

POINTS, FRAMES, RANK = 3, 100, 64
DOCUMENT = 204  # tokens of a typical sample: 100 frames, a question, an answer


@dataclass(frozen=True)
class Case:
    """One benchmark: `op` at one shape. fraction: rows with a target, of all T."""

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
        """The least (FLOPs, bytes) of any implementation, for `Roofline.floor`."""
        size = self.dtype.itemsize
        if self.op == "lora":
            # Three stacked square layers: y and dX through W, and the four thin products of A and B.
            flops = 4 * self.tokens * self.depth * 3 * self.depth + 6 * self.tokens * 2 * self.depth * 3 * RANK
            return flops, size * (self.tokens * self.depth * 8 + 6 * self.depth**2)
        if self.op == "rope":
            # Copy q, k, v; rotate q and k; read three gradients and write them as one.
            return 12.0 * self.tokens * self.depth, size * (6 + 4 + 6) * self.tokens * self.depth
        if self.op == "attention":
            return 7 * self.tokens * DOCUMENT * self.depth, size * 8 * self.tokens * self.depth
        gemms = 3 if self.op == "trajectory" or not self.frozen else 2
        return 2.0 * gemms * self.rows * self.depth * self.outputs, size * (2 * self.rows + self.tokens) * self.depth


class Inputs:
    """Random inputs of a case; `double` returns the same numbers in float64."""

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
            # At a distance of 2 from the predictions, so that rounding does not change a sign in the correctness check.
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
        elif case.op == "rope":
            heads = max(1, d // 128)
            self.fused = normal(case.tokens, 3 * d).requires_grad_()
            positions = torch.arange(case.tokens, device=device) % DOCUMENT
            self.tables = list(rope_tables(positions, d // heads, dtype=case.dtype))
            self.upstreams = [normal(case.tokens, heads, d // heads) for _ in range(3)]
        elif case.op == "attention":
            heads = max(1, d // 128)
            self.qkv = [normal(case.tokens, heads, d // heads).requires_grad_() for _ in range(3)]
            bounds = [*range(0, case.tokens, DOCUMENT), case.tokens]
            self.bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
            self.upstream = normal(case.tokens, heads, d // heads)

    def double(self) -> Inputs:
        copy = object.__new__(Inputs)
        for name, value in vars(self).items():
            copy.__dict__[name] = [_double(t) for t in value] if isinstance(value, list) else _double(value)
        return copy

    @property
    def supervised(self) -> Tensor:
        """The rows of hidden that have a target, (rows, d)."""
        return self.hidden if self.case.rows == self.case.tokens else self.hidden[self.rows]

    @cached_property
    def dense_targets(self) -> Tensor:
        full = torch.full((self.case.tokens, POINTS, FRAMES, 2), -1.0, device=self.device, dtype=self.targets.dtype)
        return full.index_copy(0, self.rows, self.targets)

    @cached_property
    def labels(self) -> Tensor:
        return torch.full((self.case.tokens,), -100, device=self.device).index_copy(0, self.rows, self.ids)

    def gradients(self, value: Tensor, *inputs: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
        """The value, and its gradients of those inputs that require one."""
        return [value, *torch.autograd.grad(value, [t for t in inputs if t.requires_grad], upstream)]


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def gpu_cases() -> list[Case]:
    """The real shapes: one packed row of 16,384 tokens in a 7B and a 13B model, the 7B first."""
    cases = []
    for depth in (4096, 5120):
        cases += [Case(op, 16384, depth, f) for op in ("trajectory", "cross_entropy") for f in (1.0, 0.5, 0.25, 0.1)]
        cases += [Case(op, 16384, depth) for op in ("lora", "rope", "attention")]
    trainable = [Case("cross_entropy", 16384, 4096, f, frozen=False) for f in (1.0, 0.25)]
    return [*cases, *trainable, Case("cross_entropy", 16384, 4096, smoothing=0.0)]


def cpu_cases() -> list[Case]:
    """Small float32 shapes; without rotary embedding, which is plain PyTorch on a CPU."""
    small = [Case("trajectory", 1024, 512, f, dtype=torch.float32) for f in (1.0, 0.5, 0.25, 0.1)]
    small += [Case("cross_entropy", 512, 256, f, vocabulary=4000, dtype=torch.float32) for f in (1.0, 0.25, 0.1)]
    return [*small, Case("lora", 512, 256, dtype=torch.float32), Case("attention", 1024, 256, dtype=torch.float32)]
