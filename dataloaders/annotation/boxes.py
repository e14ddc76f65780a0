"""Boxes [left, top, right, bottom] in pixels: their overlap, and their masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def box_ious(boxes: np.ndarray, true: np.ndarray) -> np.ndarray:
    """IoU (n,) of boxes (n, 4) with one box (4,), or each with its own (n, 4); 0 where both are empty."""
    low, high = np.maximum(boxes[:, :2], true[..., :2]), np.minimum(boxes[:, 2:], true[..., 2:])
    shared = np.maximum(high - low, 0).prod(1)
    area, other = (np.maximum(each[..., 2:] - each[..., :2], 0).prod(-1) for each in (boxes, true))
    return np.asarray(shared / np.maximum(area + other - shared, 1e-9))


def filled(box: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The mask (H, W) bool of a box (4,) in an image of size (H, W, ...)."""
    mask = np.zeros(tuple(size[:2]), bool)
    left, top, right, bottom = box.round().astype(int)
    mask[top:bottom, left:right] = True
    return mask
