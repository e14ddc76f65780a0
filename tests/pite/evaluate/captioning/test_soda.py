"""SODA's dynamic programme against brute force, and IoUs by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pite.evaluate.captioning.answers import Caption
from pite.evaluate.captioning.soda import best_sum, f_measure, ious


def brute_force(scores: np.ndarray) -> float:
    """The best of all ways to pair rows with columns in order."""
    rows, columns = scores.shape
    return max(
        sum(scores[r, c] for r, c in zip(chosen, those))
        for size in range(min(rows, columns) + 1)
        for chosen in itertools.combinations(range(rows), size)
        for those in itertools.combinations(range(columns), size)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 3), (4, 4), (5, 3), (3, 6)])
def test_best_sum_equals_brute_force(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0] * 10 + shape[1])
    for _ in range(20):
        scores = rng.uniform(size=shape) * (rng.uniform(size=shape) < 0.7)
        assert best_sum(scores) == pytest.approx(brute_force(scores))


def test_captions_out_of_order_match_only_in_part() -> None:
    assert best_sum(np.array([[0.0, 0.9], [0.8, 0.0]])) == 0.9
    assert best_sum(np.array([[0.9, 0.0], [0.0, 0.8]])) == pytest.approx(1.7)


def test_the_f_measure_by_hand() -> None:
    scores = np.array([[0.5, 0.1, 0.0], [0.0, 0.2, 0.4]])
    precision, recall = 0.9 / 3, 0.9 / 2
    assert f_measure(scores) == pytest.approx(2 * precision * recall / (precision + recall))
    assert f_measure(np.zeros((2, 3))) == f_measure(np.zeros((0, 3))) == f_measure(np.zeros((2, 0))) == 0.0


def test_more_captions_than_the_recursion_limit() -> None:
    assert best_sum(np.eye(1500)) == 1500.0


def test_ious_by_hand() -> None:
    predicted = [Caption("", 0, 10), Caption("", 5, 10), Caption("", 20, 30), Caption("", 9, 1), Caption("", 5, 5)]
    references = [Caption("", 0, 10), Caption("", 10, 20), Caption("", 5, 5)]
    expected = [[1, 0.5, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert ious(predicted, references) == pytest.approx(np.array(expected), abs=1e-6)
