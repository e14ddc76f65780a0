"""Private interfaces of torch, all in one place: a new version of torch may change them.

tests/engine/distributed/test_private.py has a test of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def default_group() -> dist.ProcessGroup:
    """The process group of all ranks."""
    return dist.distributed_c10d._get_default_group()


def backend_of(group: dist.ProcessGroup, kind: str) -> Any:
    """The back end of a process group for a kind of device, "cpu" or "cuda"."""
    return group._get_backend(torch.device(kind))


def has_nccl2() -> bool:
    """Whether torch has the NCCL back end that aborts the process one second after an error, the default of torch 2.15."""
    return hasattr(dist.distributed_c10d, "ProcessGroupNCCL2")


def collectives_begun(backend: Any) -> int:
    """Number of collectives that this rank has begun in a back end."""
    return int(backend._get_sequence_number_for_group())
