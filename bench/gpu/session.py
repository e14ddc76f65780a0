"""Runs the sections of a session one after the other, each in a process of its own, within a budget of seconds.

A section that breaks the device (an illegal address, a hang) ends with its process. The processes are forked from one
that has all imports, which saves each section the seconds that these take; where CUDA does not work in such a process,
they start from nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from bench.gpu.results import NotRun, Output, Session, State
from dataloaders.errors import reason
from dataloaders.files import read_json_object

REPORT_EVERY = 20.0
"""Seconds between two lines of progress."""

PATIENCE = 3
"""Multiple of its estimate after which a section on a GPU is taken for hanging, and stopped."""

SHORTEST_PATIENCE = 120.0
"""Seconds that every section gets, if the budget has them."""


@dataclass(frozen=True)
class Section:
    """A part of a session.

    run      MODULE:FUNCTION, a function of the device's name and the section's file; it raises NotRun with the reason
    gpu      estimated seconds on an H100, its start included
    cpu      estimated seconds on one core of a CPU, where all shapes are tiny
    measures one line for the report
    """

    name: str
    run: str
    gpu: float
    cpu: float
    measures: str

    def estimate(self, device: str) -> float:
        return self.gpu if device.startswith("cuda") else self.cpu


@dataclass(frozen=True)
class Options:
    """results: folder; budget: seconds from `begin`, a time.monotonic(); commit: where the source is no checkout."""

    results: Path
    budget: float
    device: str
    begin: float
    commit: str | None = None

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.begin + self.budget - time.monotonic()


def run_session(sections: Sequence[Section], options: Options, describe: Section, preload: Sequence[str]) -> int:
    """Run the sections that fit; returns the number of those with a failure or a red check.

    describe  a section that writes the environment
    preload   modules that the processes import before they are forked
    Raises ValueError if the device does not work, or if the folder has results of another device or commit.
    """
    context, environment = _start(options, describe, preload)
    session = Session(options.results, environment)
    session.plan({s.name: {"estimate": s.estimate(options.device), "measures": s.measures} for s in sections})
    for index, section in enumerate(sections):
        estimate = section.estimate(options.device)
        header = {"section": section.name, "measures": section.measures, "environment": environment}
        if estimate > options.left:
            why = f"needs about {estimate:.0f} s, and {max(0.0, options.left):.0f} s of the budget are left"
            session.set(section.name, "not run", problem=why)
            progress(f"{section.name}: {why}")
            continue
        session.set(section.name, "running")
        progress(
            f"{section.name} ({index + 1} of {len(sections)}): about {estimate:.0f} s, {options.left:.0f} s are left"
        )
        begin = time.monotonic()
        ended = _run(context, section, options, header)
        state = ended.pop("state")
        session.set(section.name, state, seconds=round(time.monotonic() - begin, 1), **ended)
        progress(f"{section.name}: {state}{': ' + ended['problem'] if 'problem' in ended else ''}")
    records = [session.sections[section.name] for section in sections]
    return sum(record["state"] in ("failed", "stopped") or bool(record.get("red")) for record in records)


def _start(options: Options, describe: Section, preload: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """The way to start processes in which the device works, and the environment."""
    options.results.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    for method in ("forkserver", "spawn"):
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(list(preload))
        ended = _run(context, describe, options, {})
        file = _file(options, describe)
        if ended["state"] == "done":
            environment = read_json_object(file)["environment"]
            file.unlink()
            for problem in problems:
                progress(problem)
            return context, environment | ({"commit": options.commit} if options.commit else {})
        file.unlink(missing_ok=True)
        problems.append(f"{method}: {ended['problem']}")
    raise ValueError(f"{options.device} does not work here ({ended['problem']}): --device cpu tries the script")


def _file(options: Options, section: Section) -> Path:
    return options.results / f"{section.name}.json"


def _run(context: Any, section: Section, options: Options, header: dict[str, Any]) -> dict[str, Any]:
    """Run a section in a process until it ends or has to be stopped; returns its state, and the problem if any."""
    path = _file(options, section)
    process = context.Process(target=_be_section, args=(section, options.device, path, header))
    limit = options.left
    if options.device.startswith("cuda"):
        limit = min(limit, max(SHORTEST_PATIENCE, PATIENCE * section.gpu))
    path.unlink(missing_ok=True)  # of an earlier call
    try:
        process.start()
    except (OSError, EOFError) as error:  # the process that is forked from did not survive its imports
        return {"state": "failed", "problem": f"its process did not start: {reason(error)}"}
    end = time.monotonic() + limit
    while process.is_alive() and time.monotonic() < end:
        process.join(min(REPORT_EVERY, max(0.0, end - time.monotonic())))
        if process.is_alive():
            progress(f"{section.name}: running, {options.left:.0f} s are left")
    if not process.is_alive():
        return _ended(path, "failed", f"its process ended with exit code {process.exitcode}")
    _kill_group(process.pid)
    process.join()
    return _ended(path, "stopped", f"stopped after {limit:.0f} s")


def _ended(path: Path, state: State, problem: str) -> dict[str, Any]:
    """The outcome that a section has written. `state` and `problem` are for one that has not come to its end."""
    content = read_json_object(path) if path.exists() else {}
    red = {"red": content["red"]} if "red" in content else {}
    if content.get("state", "running") == "running":
        return {"state": state, "problem": problem, **red}
    return {key: content[key] for key in ("state", "problem") if key in content} | red


def _be_section(section: Section, device: str, path: Path, header: dict[str, Any]) -> None:
    """The process of a section: its group is killed with it, and it ends with the session."""
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    sys.stdout = sys.stderr  # rows are progress here
    output = Output(path, {**header, "state": "running"})
    try:
        resolve_name(section.run)(device, output)
    except NotRun as error:
        output.update(state="not run", problem=str(error))
    except Exception as error:
        problem = f"{type(error).__name__}: {reason(error)}"
        output.update(state="failed", problem=problem, traceback=traceback.format_exc())
    else:
        output.update(state="done")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    _kill_group(os.getpid())


def _kill_group(pid: int) -> None:
    """Kill a section's process and those that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not begun a group yet
        os.kill(pid, signal.SIGKILL)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
