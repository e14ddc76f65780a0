"""Print an error once per job, not once per rank.

Which rank prints cannot be fixed beforehand, because torchrun ends all ranks as soon as one has ended. Instead, the
ranks that have an error count themselves in the key-value store, and the first one prints it. Nothing here is a
collective: a rank that alone has an error prints it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from dataloaders.ranks import Ranks

COLLECT_SECONDS = 2.0
"""Seconds that the first rank waits for the others to have the same error. If some do not, it adds its own name."""


def print_error(program: str, error: str) -> None:
    """Print an error on stderr, once for all ranks that have it. If some do not have it, add the first rank's name."""
    ranks = Ranks.read()
    record_error(f"{program}: {error}")
    prefix: str | None = ""
    if ranks.size > 1:
        try:
            prefix = _prefix(error, ranks.rank, ranks.size)
        except RuntimeError:
            prefix = _rank_name(ranks.rank)  # the store is gone, and the other ranks with it
    if prefix is not None:
        print(f"{program}: {prefix}{error}", file=sys.stderr, flush=True)


def record_error(sentence: str) -> None:
    """Write why this rank ends to the file that torchrun gives it; torchrun's report, its last output, then quotes it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not Path(path).exists():
        content = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": content}))


def _prefix(error: str, rank: int, size: int) -> str | None:
    """The start of the printed line; None when another rank prints it."""
    import torch.distributed as dist

    from engine.distributed import start

    if not start.torchrun_hosts_store() and not dist.is_initialized():
        return "" if rank == 0 else _rank_name(rank)  # no store: unknown whether the others have it too
    store = dist.TCPStore(*start.store_address(), is_master=False, timeout=timedelta(seconds=10))
    key = f"pite/error/{start.attempt()}/{hashlib.sha256(error.encode()).hexdigest()}"
    until = time.monotonic() + COLLECT_SECONDS
    if store.add(key, 1) > 1:
        # If this rank ended now, torchrun would end the rank that prints.
        while time.monotonic() < until + 1 and not store.check([f"{key}/printed"]):
            time.sleep(0.02)
        return None
    while time.monotonic() < until and store.add(key, 0) < size:
        time.sleep(0.02)
    prefix = "" if store.add(key, 0) == size else _rank_name(rank)
    store.set(f"{key}/printed", "")
    return prefix


def _rank_name(rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()}): "


def exit_process(status: int) -> None:
    """End the process; after an error at once, since a collective that never finishes would keep the interpreter alive."""
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
