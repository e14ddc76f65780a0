"""One sentence, once: of the ranks that meet the same error, the first says it.

Which one that is cannot be fixed beforehand, because torchrun ends all ranks as soon as one has ended. They count
themselves in the key-value store instead; nothing here is collective, so that a rank which is alone with its error says it too.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from datetime import timedelta

from dataloaders.ranks import Ranks

TOGETHER = 2.0
"""Seconds that the first rank gives the others to meet the same error, before it says that it is alone with it."""


def say_error(program: str, error: str) -> None:
    """Print an error on stderr, once for all ranks that have it; where some do not, it names the first that has it."""
    ranks = Ranks.read()
    whose: str | None = ""
    if ranks.size > 1:
        try:
            whose = _whose(error, ranks.rank, ranks.size)
        except RuntimeError:
            whose = _name(ranks.rank)  # the store is gone, and with it the others
    if whose is not None:
        print(f"{program}: {whose}{error}", file=sys.stderr, flush=True)


def _whose(error: str, rank: int, size: int) -> str | None:
    """What the sentence begins with; None where another rank says it."""
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized():
        return "" if rank == 0 else _name(rank)  # nothing tells whether the others have it too
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))
    key = f"pite/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{hashlib.sha256(error.encode()).hexdigest()}"
    until = time.monotonic() + TOGETHER
    if store.add(key, 1) > 1:
        # Ending now would have torchrun end the one that speaks.
        while time.monotonic() < until + 1 and not store.check([f"{key}/said"]):
            time.sleep(0.02)
        return None
    while time.monotonic() < until and store.add(key, 0) < size:
        time.sleep(0.02)
    whose = "" if store.add(key, 0) == size else _name(rank)
    store.set(f"{key}/said", "")
    return whose


def _name(rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()}): "
