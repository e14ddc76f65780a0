"""Checks of the losses' arguments: one sentence as a ValueError, before a kernel reads wrong memory."""

from __future__ import annotations

from torch import Tensor


def check_hidden(op: str, hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless hidden is (T, d) and weight (outputs, d), both floating, both on one device."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit")
    if not (hidden.is_floating_point() and weight.is_floating_point()) or hidden.device != weight.device:
        raise ValueError(f"{op}: hidden and weight must be floating tensors on one device")


def check_normalizer(op: str, normalizer: Tensor | None) -> None:
    """Raise ValueError unless the normalizer is None or a 0-dim floating tensor."""
    if normalizer is not None and (normalizer.dim() != 0 or not normalizer.is_floating_point()):
        raise ValueError(f"{op}: normalizer must be a 0-dim floating tensor, not {tuple(normalizer.shape)}")


def check_reduction(op: str, reduction: str) -> None:
    """Raise ValueError for an unknown reduction."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'none', not {reduction!r}")


def check_weights(op: str, weights: Tensor | None, targets: Tensor, normalizer: Tensor | None, reduction: str) -> None:
    """Raise ValueError unless `weights` has a number for each target, and the reduction is known."""
    check_reduction(op, reduction)
    if reduction == "none" and normalizer is not None:
        raise ValueError(f"{op}: reduction='none' divides by nothing; leave the normalizer out")
    if weights is None:
        return
    if weights.shape != targets.shape[:1] or not weights.is_floating_point() or weights.requires_grad:
        raise ValueError(
            f"{op}: weights must be floating ({targets.shape[0]},) without gradients, not {tuple(weights.shape)}"
        )
    check_devices(op, targets, weights)


def check_devices(op: str, hidden: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on hidden's device: moving one here would synchronize with the GPU."""
    for other in others:
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{op}: hidden is on {hidden.device}, another input on {other.device}")


def validate_rows(op: str, rows: Tensor, count: int) -> None:
    """Raise ValueError with the first row outside [0, count)."""
    bad = (rows < 0) | (rows >= count)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(f"{op}: rows[{first}] = {int(rows[first])} is out of range; hidden has {count} rows")
