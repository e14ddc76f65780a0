"""Prefetch: order, bounded number, exceptions in the place of their item, and no threads left running."""

from __future__ import annotations

import threading
import time

import pytest

from dataloaders.samples.prefetch import prefetch


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_order(workers: int) -> None:
    def make(i: int) -> int:
        time.sleep(0.003 * (i % 3 == 0))
        return i * i

    assert list(prefetch(make, range(3, 40), workers)) == [i * i for i in range(3, 40)]
    assert list(prefetch(make, range(0), workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_is_bounded(workers: int) -> None:
    made: list[int] = []
    batches = prefetch(lambda i: made.append(i) or i, range(100), workers, ahead=3)
    assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]
    deadline = time.monotonic() + 5
    most = 4 if workers == 0 else 4 + workers + 3
    while len(made) < most and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(made) == most
    batches.close()


def test_two_are_made_at_a_time() -> None:
    """Each of two items waits until the other has started."""
    barrier = threading.Barrier(2, timeout=10)
    assert list(prefetch(lambda i: barrier.wait() >= 0, range(4), workers=2)) == [True] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_raised_in_the_place_of_its_item(workers: int) -> None:
    def make(i: int) -> int:
        if i == 2:
            raise ValueError("step 2 is bad")
        return i

    batches = prefetch(make, range(5), workers)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="step 2 is bad"):
        next(batches)


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    batches = prefetch(lambda i: i, range(1000), workers=2)
    next(batches)
    batches.close()
    assert threading.active_count() == before
