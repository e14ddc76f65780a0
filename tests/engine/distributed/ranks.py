"""Start the ranks of a run as local processes, forked from one that has all imports, so that a launch is fast.

The tests use it instead of `torchrun`, with the same environment. `torchrun` itself is tested in test_lost_ranks.py.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.engine.distributed.preloaded"])


@dataclass(frozen=True)
class Ranks:
    """Running processes and the log of each one's stderr."""

    processes: list[Any]
    logs: list[Path]

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes, once all have ended. Processes that still run after `seconds` are killed and have None."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def wait_like_torchrun(self, seconds: float = 120) -> list[int | None]:
        """Exit codes; as soon as one rank has ended with an error, the others are killed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not any(process.exitcode for process in self.processes):
            time.sleep(0.02)
        return self.wait(0)

    def stderr(self, rank: int) -> str:
        return self.logs[rank].read_text()


def launch(size: int, logs: Path, function: Callable[..., int], *arguments: Any) -> Ranks:
    """Start `function(*arguments)` on `size` ranks; its result is the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"rank{rank}.log" for rank in range(size)]
    processes = [
        CONTEXT.Process(target=_be_rank, args=(rank, size, port, files[rank], function, arguments))
        for rank in range(size)
    ]
    for file, process in zip(files, processes):
        file.touch()  # a rank that is killed early has an empty log
        process.start()
    return Ranks(processes, files)


def train(size: int, logs: Path, arguments: list[str], code: str = "") -> Ranks:
    """Start engine.train on `size` ranks; `code` runs before it, for patches."""
    return launch(size, logs, _train, arguments, code)


def train_alone(log: Path, arguments: list[str], code: str = "") -> Any:
    """Start engine.train in one process, as without torchrun and with the threads of this one; returns the process."""
    import torch

    log.touch()
    process = CONTEXT.Process(target=_run, args=(log, _train, (arguments, code, torch.get_num_threads())))
    process.start()
    return process


def _train(arguments: list[str], code: str, threads: int = 1) -> int:
    import torch

    from engine.train import main

    torch.set_num_threads(threads)
    exec(code, {"rank": int(os.environ.get("RANK", "0"))})
    return main(arguments)


def _be_rank(rank: int, size: int, port: int, log: Path, function: Callable[..., int], arguments: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    _run(log, function, arguments)


def _run(log: Path, function: Callable[..., int], arguments: Any) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        status = function(*arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 70
    sys.stderr.flush()
    os._exit(status)
