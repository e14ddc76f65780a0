"""Prepare the next batches on threads while the device works on this one.

It uses threads instead of processes: batches are copied from mapped files by NumPy and PyTorch, which release Python's
lock, and pinned memory belongs to the process that allocates it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


def prefetch(make: Callable[[S], T], items: Sequence[S], workers: int = 2, ahead: int = 2) -> Generator[T, None, None]:
    """Yield make(item) for `items`, in order, computed by `workers` threads up to `workers + ahead` items before use.

    With 0 workers each is computed on demand. An exception is raised in the place of its item.
    """
    if workers == 0:
        yield from map(make, items)
        return
    # A thread starts on device 0. Pinning memory there would create a context of hundreds of MB for every rank.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    start = None if device is None else lambda: torch.cuda.set_device(device)
    pool = ThreadPoolExecutor(workers, "prefetch", start)
    pending: deque[Future[T]] = deque()
    remaining = iter(items)
    try:
        for _, item in zip(range(workers + ahead), remaining):
            pending.append(pool.submit(make, item))
        while pending:
            made = pending.popleft().result()
            for item in remaining:
                pending.append(pool.submit(make, item))
                break
            yield made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
