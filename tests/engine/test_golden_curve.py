"""The loss curve of a hundred steps equals the committed one. A change that alters it must explain and commit it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.golden.loss_curve import FILE, NUMBERS, RECIPE, STEPS, curve

TOLERANCE = 1e-5
"""Relative. Other instruction sets (SSE4, AVX2, AVX-512), PyTorch instead of the C++ operators, and float64 change no
number by more than 1e-6. A change of the learning rate, the smoothing or lambda by one per mille changes the loss by
1.6e-3."""


def golden() -> np.ndarray:
    content = json.loads(FILE.read_text())
    assert tuple(content["numbers"]) == NUMBERS
    return np.array(content["steps"])


def distance(found: list[list[float]]) -> np.ndarray:
    expected = golden()
    return (np.abs(np.array(found) - expected) / np.abs(expected)).max(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_curve_is_the_committed_one(dtype):
    expected = golden()
    assert expected.shape == (STEPS, len(NUMBERS))
    assert expected[-1, 0] < 0.6 * expected[0, 0], "it learns"
    far = distance(curve(dtype=dtype))
    assert (far <= TOLERANCE).all(), dict(zip(NUMBERS, far))


@pytest.mark.parametrize("change", [{"learning_rate": 3.003e-3}, {"label_smoothing": 0.0999}])
def test_a_change_of_one_per_mille_is_detected(change):
    assert distance(curve(replace(RECIPE, **change)))[0] > 100 * TOLERANCE
