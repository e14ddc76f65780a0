"""Sections without a device, for the tests of the session. It imports no torch, so that sessions start fast."""

from __future__ import annotations

import os
import time
from multiprocessing.util import Finalize
from pathlib import Path

from bench.gpu.results import NotRun, Output
from bench.gpu.session import Options, Section, run_session


def section(name: str, seconds: float = 0.1) -> Section:
    return Section(name, f"tests.bench.gpu.pretended:{name}", seconds, seconds, f"what {name} measures")


def run(folder: Path, *names: str, budget: float = 300, environment: str = "environment") -> int:
    """A session of the sections of these names."""
    options = Options(folder, budget, "cpu", time.monotonic())
    return run_session([section(name) for name in names], options, section(environment), ())


def environment(device: str, output: Output) -> None:
    output.update(environment={"device": "a device", "commit": "abc"})


def no_device(device: str, output: Output) -> None:
    raise RuntimeError("no driver is loaded")


def writes(device: str, output: Output) -> None:
    """A row every few milliseconds."""
    for number in range(100):
        output.add([{"case": "a", "kernel": "b", "tiles": str(number), "problem": "none" * 200}])
        time.sleep(0.002)


def red(device: str, output: Output) -> None:
    output.count_red(1)
    output.count_red(1)


def fails(device: str, output: Output) -> None:
    output.add([{"case": "a", "kernel": "b", "tiles": "1", "problem": "kept"}])
    raise RuntimeError("no such kernel\nand more")


def dies(device: str, output: Output) -> None:
    os._exit(9)


def absent(device: str, output: Output) -> None:
    raise NotRun("it is not installed")


def dies_at_its_end(device: str, output: Output) -> None:
    """As a driver may."""
    Finalize(None, os._exit, args=(11,), exitpriority=0)


def hangs(device: str, output: Output) -> None:
    output.update(passed=True, summary="before it hangs", pid=os.getpid())
    time.sleep(1000)


def step(device: str, output: Output) -> None:
    """`writes` under a second name."""
    writes(device, output)
