"""Shared by the kernel tests: random inputs, and assertions about accuracy and reproducibility."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Heads:
    """Inputs of both losses; gradients flow to hidden, lm_weight, weight and bias."""

    hidden: Tensor
    lm_weight: Tensor
    target_ids: Tensor
    target_rows: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    rows: Tensor

    @property
    def trainable(self) -> tuple[Tensor, ...]:
        return self.hidden, self.lm_weight, self.weight, self.bias

    def to(self, dtype: torch.dtype) -> Heads:
        """The same numbers in another dtype, as new leaf tensors."""
        names = ("hidden", "lm_weight", "weight", "bias")
        leaves = {n: getattr(self, n).detach().to(dtype).requires_grad_() for n in names}
        return replace(self, **leaves)


def make_heads(
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int = 37,
    depth: int = 32,
    points: int = 3,
    frames: int = 5,
    count: int = 11,
    supervised: int = 13,
    vocabulary: int = 50,
    absent: float = 0.3,
    seed: int = 0,
    device: str = "cpu",
) -> Heads:
    """Random heads; `absent` is the fraction of absent points. Rows are drawn with replacement, so some repeat."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, points, frames, 2, generator=g)
    targets[torch.rand(count, points, frames, generator=g) < absent] = -1
    outputs = points * frames * 2

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype).requires_grad_()

    def integers(high: int, n: int) -> Tensor:
        return torch.randint(0, max(high, 1), (n,), generator=g).to(device)

    heads = Heads(
        hidden=normal(tokens, depth),
        lm_weight=normal(vocabulary, depth, scale=depth**-0.5),
        target_ids=integers(vocabulary, supervised),
        target_rows=integers(tokens, supervised),
        weight=normal(outputs, depth, scale=0.1 * depth**-0.5),
        bias=torch.rand(outputs, generator=g).to(device, dtype).requires_grad_(),
        targets=targets.to(device),
        rows=integers(tokens, count),
    )
    return replace(heads, targets=_clear_of_ties(heads))


def _clear_of_ties(heads: Heads) -> Tensor:
    """Targets at a distance from the predictions: close to them, rounding would decide the sign of the L1 gradient."""
    exact = heads.to(torch.float64)
    predictions = (exact.hidden[heads.rows] @ exact.weight.T + exact.bias).view_as(heads.targets).detach()
    close = (predictions - heads.targets).abs() < 0.05
    return torch.where(close, predictions + 0.1, heads.targets.double()).to(heads.targets.dtype)


def run(loss: Callable[[], Tensor], inputs: Sequence[Tensor], upstream: float = 1.7) -> list[Tensor]:
    """The loss, and the gradients of `upstream` times the loss."""
    value = loss()
    return [value.detach(), *torch.autograd.grad(value * upstream, inputs)]


def assert_as_accurate(ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Each result has at most twice the error of plain PyTorch in the same dtype, both against float64.

    ours, plain and truth are (value, gradient of the first input, ...). The floor is one rounding to that input's dtype
    (half of it for the value), because plain PyTorch may be exact by chance.
    """
    assert len(ours) == len(plain) == len(truth)
    rounding = ROUNDING[ours[1].dtype]
    for index, (a, b, exact) in enumerate(zip(ours, plain, truth)):
        assert a.shape == exact.shape
        assert a.isfinite().all(), f"result {index} is not finite"
        if exact.numel() == 0:
            continue
        error, plain_error = ((t.double() - exact).abs().max().item() for t in (a, b))
        floor = rounding * exact.abs().max().item() * (1 if index else 0.5)
        assert error <= 2 * plain_error + floor, f"result {index}: error {error:.3g}, PyTorch's {plain_error:.3g}"


def assert_bitwise(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {index} differs in {(a != b).sum().item()} of {a.numel()} values"
