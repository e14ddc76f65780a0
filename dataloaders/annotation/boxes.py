"""Overlap of boxes."""

from __future__ import annotations

import numpy as np


def box_ious(boxes: np.ndarray, true: np.ndarray) -> np.ndarray:
    """IoU (n,) of boxes (n, 4) with one box (4,); 0 where both are empty."""
    low, high = np.maximum(boxes[:, :2], true[:2]), np.minimum(boxes[:, 2:], true[2:])
    shared = np.maximum(high - low, 0).prod(1)
    areas = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(1) + np.maximum(true[2:] - true[:2], 0).prod()
    return np.asarray(shared / np.maximum(areas - shared, 1e-9))
