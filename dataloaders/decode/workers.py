"""A process pool for tasks that may hang or crash: Pebble's, which ends one task without the others.

The pools of the standard library cannot: a decoder that hangs in C holds its process for ever, and a process that dies
breaks the whole pool. Here each costs its own task; the process is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as TimedOut
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

_NO_PROCESSES = "the decoding processes have ended, or could not be started"


class TaskLost(Exception):
    """A task without a result: its process died, or was killed at the time limit. The message gives the reason."""


class Workers:
    """`count` spawned processes. A context manager; leaving it ends the processes at once.

    time_limit  seconds that a task may take before its process is killed and replaced; None for no limit
    """

    def __init__(self, count: int, time_limit: float | None = None) -> None:
        assert count > 0
        self.count, self.time_limit = count, time_limit
        self._lock, self._closed, self._may_restart = threading.Lock(), False, True
        self._pool = _start(count)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run `function`, which can be pickled, in a process; its result or exception is that of the Future.

        The Future raises TaskLost when the process died or exceeded the time limit, and RuntimeError when the pool is
        closed or its processes cannot be started.
        """
        answer: Future[Any] = Future()
        self._schedule(answer, function, arguments, attempts=2)
        return answer

    def close(self) -> None:
        """End the processes; unfinished tasks have no result."""
        with self._lock:
            self._closed = True
        self._pool.stop()
        self._pool.join()

    def _schedule(
        self, answer: Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...], attempts: int
    ) -> None:
        if not attempts:
            answer.set_exception(RuntimeError(_NO_PROCESSES))
            return
        try:
            with self._lock:
                # Pebble closes the pool when an idle process dies. Processes that cannot start at all would die again,
                # so it is started once until there is a result.
                if not self._pool.active and self._may_restart and not self._closed:
                    self._pool, self._may_restart = _start(self.count), False
                task = self._pool.schedule(function, args=list(arguments), timeout=self.time_limit)
        except RuntimeError:
            answer.set_exception(RuntimeError(_NO_PROCESSES))
        else:
            again = partial(self._schedule, answer, function, arguments, attempts - 1)
            task.add_done_callback(lambda done: self._finish(done, answer, again))

    def _finish(self, task: Future[Any], answer: Future[Any], again: Callable[[], None]) -> None:
        try:
            answer.set_result(task.result())
            self._may_restart = True
        except BrokenProcessPool:
            again()
        except CancelledError:
            answer.set_exception(RuntimeError(_NO_PROCESSES))
        except ProcessExpired:
            answer.set_exception(TaskLost("the process that decoded it died"))
        except Exception as error:
            if isinstance(error, TimedOut) and error.args[:1] == ("Task timeout",):  # not one that the task raised
                error = TaskLost(f"it took more than {self.time_limit:g} s and was stopped")
            answer.set_exception(error)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start(count: int) -> ProcessPool:
    # A forked process would copy locks and device contexts in an undefined state.
    return ProcessPool(count, initializer=_set_up, context=multiprocessing.get_context("spawn"))


def _set_up() -> None:
    """In each process: leave interrupts to the parent, which then ends its workers, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End with the parent, even if it was killed; a task would continue without it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
