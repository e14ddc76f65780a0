"""CPU settings: the cores that a process may use, and the wait policy of its OpenMP threads."""

from __future__ import annotations

import os

_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def available_cores() -> int:
    """Number of cores this process may use: its affinity on Linux, else all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_wait_policy() -> None:
    """Make OpenMP threads sleep while they wait, unless the user set a policy. Call it before torch is imported.

    By default they spin. If another process occupies the core of the thread they wait for, spinning delays both:
    bench/load.py measures it.
    """
    if not any(name in os.environ for name in _WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
