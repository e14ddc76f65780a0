"""The processes of an evaluation on several GPUs, started by torchrun. They meet at barriers and share a file system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from dataloaders.ranks import Ranks

LONGEST_WAIT = timedelta(days=30)
"""Processes finish their shares at different times. torchrun ends all of them when one fails."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the job of torchrun, if there is one, until the block ends."""
    ranks = Ranks.read()
    if ranks.size == 1:
        yield ranks
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def barrier(ranks: Ranks) -> None:
    """Wait for all processes. Raises ValueError if one of them has ended."""
    if ranks.size == 1:
        return
    import torch.distributed as dist

    try:
        dist.barrier()
    except RuntimeError:
        raise ValueError("another process of the job has ended: its message has the reason") from None
