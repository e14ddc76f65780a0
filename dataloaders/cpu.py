"""CPU settings: the cores that a process may use, and the wait policy of its OpenMP threads."""

from __future__ import annotations

import os

WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""OpenMP threads spin for 1,000 rounds, which covers most gaps between the operations of a small step, then sleep."""

_WAIT_VARIABLES = (*WAIT_POLICY, "KMP_BLOCKTIME")


def available_cores() -> int:
    """Number of cores this process may use: its affinity on Linux, else all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_wait_policy() -> None:
    """Have OpenMP threads sleep soon while they wait, unless the user chose otherwise. Acts before torch is imported only.

    libgomp's default is 300,000 rounds. A thread that spins while another process holds the core of the thread it waits
    for delays both; without any spinning an idle machine loses a third of its speed (bench/load.py measures both).
    """
    if not any(name in os.environ for name in _WAIT_VARIABLES):
        os.environ.update(WAIT_POLICY)
