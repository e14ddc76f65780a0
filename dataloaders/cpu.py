"""The CPU: how many cores a process may use, and how its OpenMP threads wait for each other."""

from __future__ import annotations

import os

_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def available_cores() -> int:
    """Cores that this process may run on: its affinity where the system has one (Linux), else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_wait_policy() -> None:
    """Have OpenMP threads sleep while they wait, unless the user chose otherwise. Acts before torch is imported only.

    By default they spin. A thread that spins while another process holds the core of the thread it waits for delays
    both: bench/load.py measures it.
    """
    if not any(name in os.environ for name in _WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
