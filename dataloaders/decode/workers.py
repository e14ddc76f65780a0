"""Processes that may hang or die, one task at a time in each, so that it is always known whose fault it was.

The standard pools cannot end one task: a decoder that hangs in C would hold its process for ever, and a process that
dies takes the whole pool along without a word on what it was doing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")  # A fork would copy locks and device contexts in whatever state they are.


_NO_PROCESSES = "the decoding processes have ended, or could not be started"


class TaskLost(Exception):
    """A task without an answer: its process died, or was killed when the time was up. The message says which."""


@dataclass(eq=False)
class _Task:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    answer: Future[Any]
    deadline: float = float("inf")


@dataclass(eq=False)
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    ready: bool = False
    task: _Task | None = None


class Workers:
    """`count` processes, and a thread that hands out tasks. A context manager; leaving it ends the processes at once.

    time_limit  seconds that a task may take before its process is killed and replaced; None for ever
    """

    def __init__(self, count: int, time_limit: float | None = None) -> None:
        assert count > 0
        self.count, self.time_limit = count, time_limit
        self._queue: deque[_Task] = deque()
        self._lock, self._closing = threading.Lock(), False
        self._wake, self._woken = _SPAWN.Pipe(duplex=True)
        self._workers = [_start() for _ in range(count)]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have `function`, which can be pickled, called in a process; its result or exception comes in the Future.

        The Future raises TaskLost when the process died or exceeded the time limit, and RuntimeError when processes
        cannot be started at all.
        """
        task = _Task(function, arguments, Future())
        with self._lock:
            if self._closing:
                task.answer.set_exception(RuntimeError(_NO_PROCESSES))
                return task.answer
            self._queue.append(task)
        self._wake.send_bytes(b".")
        return task.answer

    @property
    def pids(self) -> list[int]:
        """Process ids, of those that run now."""
        return [worker.process.pid for worker in list(self._workers) if worker.process.pid is not None]

    def close(self) -> None:
        """End the processes; what they were doing has no answer."""
        with self._lock:
            self._closing = True
        self._wake.send_bytes(b".")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        """Take answers, replace the dead, kill the late, hand out tasks; until closed."""
        try:
            while not self._closing:
                self._serve_once()
        finally:
            with self._lock:
                self._closing = True
                for task in [*self._queue, *(worker.task for worker in self._workers if worker.task)]:
                    task.answer.set_exception(RuntimeError(_NO_PROCESSES))
            for worker in self._workers:
                _end(worker)

    def _serve_once(self) -> None:
        nearest = min((worker.task.deadline for worker in self._workers if worker.task), default=float("inf"))
        timeout = None if nearest == float("inf") else max(0.0, nearest - time.monotonic())
        answered = set(wait([self._woken, *(worker.connection for worker in self._workers)], timeout))
        if self._woken in answered:
            self._woken.recv_bytes()
        for place, worker in enumerate(self._workers):
            if worker.connection in answered:
                self._receive(place, worker)
            elif worker.task is not None and worker.task.deadline <= time.monotonic():
                worker.task.answer.set_exception(TaskLost(f"it took more than {self.time_limit:g} s and was stopped"))
                self._replace(place, worker)
        for worker in self._workers:
            if worker.ready and worker.task is None:
                self._assign(worker)

    def _receive(self, place: int, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(place, worker)
            return
        except Exception as error:  # An exception that cannot be unpickled is one nevertheless.
            message = False, error
        if message is None:
            # The first says that the process stands, the later ones that a task begins: its modules are imported.
            if worker.ready and worker.task is not None and self.time_limit is not None:
                worker.task.deadline = time.monotonic() + self.time_limit
            worker.ready = True
            return
        assert worker.task is not None
        succeeded, value = message
        if succeeded:
            worker.task.answer.set_result(value)
        else:
            worker.task.answer.set_exception(value)
        worker.task = None

    def _bury(self, place: int, worker: _Worker) -> None:
        """A process has died: in its task, or before its first."""
        if not worker.ready:
            self._closing = True  # The next would die as well.
            return
        if worker.task is not None:
            worker.task.answer.set_exception(TaskLost("the process that decoded it died"))
        self._replace(place, worker)

    def _replace(self, place: int, worker: _Worker) -> None:
        _end(worker)
        self._workers[place] = _start()

    def _assign(self, worker: _Worker) -> None:
        with self._lock:
            if not self._queue:
                return
            task = self._queue.popleft()
        worker.task = task
        try:
            worker.connection.send((task.function, task.arguments))
        except OSError:  # It died while it was idle; its connection will say so.
            worker.task = None
            with self._lock:
                self._queue.appendleft(task)
        except Exception as error:  # What cannot be pickled is for whoever asked for it.
            worker.task = None
            task.answer.set_exception(error)


def _start() -> _Worker:
    ours, theirs = _SPAWN.Pipe(duplex=True)
    process = _SPAWN.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _work(connection: Connection) -> None:
    # An interrupt is for the parent, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    connection.send(None)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(None)
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, error
        connection.send(answer)


def _follow_parent() -> None:
    """End with the parent, however it ended; a task would go on without it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
