"""Watchdog: when a rank dies or stalls, the other ranks end within a bounded time, and their message names that rank.

Each process has a thread that writes a heartbeat to the process group's key-value store and reads the heartbeats of the
other ranks. Missing heartbeats mean that a process or machine is gone. Heartbeats without progress mean that a rank is
stalled. All ranks begin the same collectives in the same order, so the stalled rank is the one that has begun the
fewest: the others wait in a collective that it never reached. The collectives themselves do not report this. They only
wait, and an exception cannot interrupt some of them (NCCL's).

Requests to the store can hang as well: where its host loses power, only TCP ends them, after a quarter of an hour. A second
thread bounds their time.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed import private, start
from engine.distributed.errors import record_error

HEARTBEAT_TIMEOUT = 20.0
"""Seconds without a heartbeat after which a rank counts as dead; less than torchrun's 30 s from SIGTERM to SIGKILL."""

HEARTBEAT_TIMEOUT_AFTER_ERROR = 4.0
"""The same after a collective failed, when only the cause is missing."""

ERROR_GRACE = 3.0
"""Seconds between reading another rank's error and ending because of it."""

STORE_TIMEOUT = 60.0
"""Seconds without an answer of the key-value store after which its host counts as lost; a pause of 40 s is survived."""

SETUP_TIMEOUT = 1800.0
"""Seconds without any progress, outside the training loop and in its first step, after which the ranks end. One rank
reads data and builds models there while the others wait. That may take long, but progress must show in between."""


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank, as it publishes it.

    number       heartbeats so far
    steps_done   steps whose end its device has reached
    collectives  collectives that it has begun
    status       what it is doing
    training     whether it is in the training loop, after the first step
    joined       whether it is connected to all other ranks
    ended        why it ended, if it did: its own error, or (`found`) a sentence about another rank that is the cause
    """

    number: int
    steps_done: int
    collectives: int
    status: str
    training: bool
    joined: bool
    host: str
    process: int
    ended: str | None
    found: bool

    @property
    def progress(self) -> tuple[int, int]:
        """Smallest for the rank that all others wait for."""
        return self.steps_done, self.collectives


class Watchdog:
    """Publishes this rank's heartbeats and checks those of the other ranks.

    stall       seconds in which some rank must make progress in the training loop; elsewhere at least `SETUP_TIMEOUT`
    device      device of this rank; the events given to `step_done` are recorded on it
    on_failure  gets the sentence about a dead or stalled rank; by default prints it and ends the process
    Raises nothing. The default `on_failure` ends the process with status 1 from the thread, since the main thread may
    never return from a collective.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        stall: float,
        device: torch.device,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._rank, self._size, self._stall, self._device = rank, size, stall, device
        # Longer intervals with many ranks: every rank reads the heartbeats of all others.
        self._interval = min(max(0.5, size / 128), stall / 4)
        self._on_failure = on_failure or self._print_and_exit
        self._steps_done, self._training, self._joined, self._status = 0, False, False, "starting"
        self._backends: list[Any] = []
        self._events: list[torch.cuda.Event] = []
        self._end_reason: str | None = None
        self._cause: str | None = None
        self._lock = threading.Lock()
        self._latest: dict[int, tuple[Heartbeat, float]] = {}
        self._last_progress: dict[int, tuple[int, int, str, bool]] = {}
        self._last_progress_time = time.monotonic()
        self._unreachable: str | None = None
        self._stop = threading.Event()
        # A client of its own: with the process group's client, a heartbeat would wait for requests of the main thread.
        store = dist.TCPStore(*start.store_address(), is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT))
        self._store = dist.PrefixStore(f"pite/watchdog/{start.attempt()}", store)
        self._waits_for_store = self._store_lost = False
        self._requests = 0
        self._heartbeats = 0
        self._write_heartbeat()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        threading.Thread(target=self._bound_requests, name="watchdog of the store", daemon=True).start()

    def attach_process_group(self) -> None:
        """Call when the process group exists: the collectives that this rank begins in it count as its progress."""
        self._joined = True
        self.count_collectives(private.default_group(), *{"cpu", self._device.type})

    def count_collectives(self, group: dist.ProcessGroup, *kinds: str) -> None:
        """Count the collectives of a group's back ends for these kinds of device as progress, too."""
        self._backends += [private.backend_of(group, kind) for kind in kinds]

    @property
    def stall(self) -> float:
        """Seconds without progress in the training loop after which the ranks end."""
        return self._stall

    def set_status(self, status: str) -> None:
        """Set what this rank is doing, for the message if it stalls. A new status counts as progress."""
        self._status = status

    def step_done(self, event: torch.cuda.Event | None = None) -> None:
        """This rank has done its part of a step and waits for the others; on CUDA, once `event` has happened."""
        if event is None:
            self._steps_done += 1
        else:
            self._events.append(event)
        self._training = True

    def pause(self) -> None:
        """The training loop is over: from here on `SETUP_TIMEOUT` applies again."""
        self._training, self._status = False, "finishing the stage"

    def diagnose(self) -> str | None:
        """After a collective failed: a sentence about the rank that caused it, or None when all ranks are alive."""
        silent = max(HEARTBEAT_TIMEOUT_AFTER_ERROR, 3 * self._interval)
        until = time.monotonic() + silent + 4 * self._interval
        while time.monotonic() < until:
            cause = self._reported_cause() or self._find_dead_rank(silent) or self._unreachable
            if cause:
                if not self._claim_cause(cause):
                    self._thread.join()  # the thread reports it, and ends the process
                return self._cause
            time.sleep(self._interval / 2)
        return None

    def close(self, reason: str = "") -> None:
        """Stop the threads and publish the reason to the other ranks; empty when the rank ends without an error.

        Returns within seconds, also where the store does not answer.
        """
        self._stop.set()
        self._thread.join(5)
        last = threading.Thread(target=self._send_last_heartbeat, args=(reason,), daemon=True)
        last.start()
        last.join(5 + 3 * self._interval)

    def _send_last_heartbeat(self, reason: str) -> None:
        self._end_reason = self._cause or reason
        # The process that hosts the store may be gone; then no rank is left to read the heartbeat.
        with suppress(RuntimeError):
            self._write_heartbeat()
            if reason and self._rank == 0 and not start.torchrun_hosts_store():
                time.sleep(3 * self._interval)  # the store ends with this process: let the others read first

    def _run(self) -> None:
        if self._device.type == "cuda":
            # A thread starts on device 0. Querying an event there would create a context of half a GB for every rank.
            torch.cuda.set_device(self._device)
        last = time.monotonic()
        while not self._stop.wait(self._interval):
            try:
                while self._events and self._events[0].query():
                    self._events.pop(0)
                    self._steps_done += 1
            except RuntimeError:
                # The device failed. The main thread gets the same error and publishes it. Keep sending heartbeats until
                # then, so that this rank does not look dead.
                self._events.clear()
            try:
                self._waits_for_store = True
                self._write_heartbeat()
                self._read_heartbeats()
                self._waits_for_store = False
                self._requests += 1
                self._unreachable = None
                sentence = self._check_ranks(starved=time.monotonic() - last > 3 * self._interval + 2)
            except RuntimeError as error:
                self._waits_for_store = False
                lost = f"{self._store_host()} died or was cut off: its key-value store is gone ({_first_line(error)})"
                self._unreachable = self._reported_cause() or lost
                # When a run ends without an error, its store may be gone a moment before this rank has ended.
                sentence = None if self._stop.wait(5) else self._unreachable
            last = time.monotonic()
            if sentence is not None and not self._stop.is_set() and self._claim_cause(sentence):
                self._send_last_heartbeat(sentence)
                self._on_failure(f"rank {self._rank} ends: {sentence}")
                return

    def _bound_requests(self) -> None:
        """End the rank where a request to the store takes longer than `STORE_TIMEOUT`.

        Time in which this thread did not run, because the process was stopped, does not count.
        """
        seconds, requests, last = 0.0, self._requests, time.monotonic()
        while not self._stop.wait(1.0) and self._cause is None:
            now = time.monotonic()
            same = self._waits_for_store and requests == self._requests
            seconds = seconds + min(now - last, 2.0) if same else 0.0
            requests, last = self._requests, now
            if seconds > STORE_TIMEOUT:
                sentence = f"{self._store_host()} was cut off: its key-value store does not answer for {seconds:.0f} s"
                self._store_lost = True
                if self._claim_cause(sentence):
                    self._on_failure(f"rank {self._rank} ends: {sentence}")

    def _print_and_exit(self, sentence: str) -> None:
        print_end(sentence)
        if self._store_lost:
            start.end_torchrun()
        os._exit(1)

    def _store_host(self) -> str:
        """torchrun hosts the store in its own process; without torchrun, or if it does not share the store, rank 0 does."""
        beat = self._latest.get(0)
        if beat and not start.torchrun_hosts_store():
            return self._name(0, beat[0])
        return f"{'torchrun' if start.torchrun_hosts_store() else 'rank 0'} on {start.store_address()[0]}"

    def _claim_cause(self, sentence: str) -> bool:
        """Whether this thread is the first to find a cause; the main thread and the watchdog may find one at once."""
        with self._lock:
            first = self._cause is None
            self._cause = self._cause or sentence
            return first

    def _write_heartbeat(self) -> None:
        self._heartbeats += 1
        self._store.set(str(self._rank), json.dumps(asdict(self._own_heartbeat())))

    def _own_heartbeat(self) -> Heartbeat:
        begun = sum(private.collectives_begun(backend) for backend in self._backends)
        return Heartbeat(
            self._heartbeats, self._steps_done, begun, self._status, self._training, self._joined,
            socket.gethostname(), os.getpid(), self._end_reason, self._cause is not None,
        )  # fmt: skip

    def _read_heartbeats(self) -> None:
        others = [rank for rank in range(self._size) if rank != self._rank]
        there = [rank for rank in others if rank in self._latest or self._store.check([str(rank)])]
        if not there:
            return
        for rank, text in zip(there, self._store.multi_get([str(rank) for rank in there])):
            beat = Heartbeat(**json.loads(text))
            if rank not in self._latest or self._latest[rank][0].number != beat.number:
                self._latest[rank] = (beat, time.monotonic())

    def _check_ranks(self, starved: bool) -> str | None:
        """A sentence about a rank that is dead or stalled, if one is.

        starved  this thread itself did not run for a while: restart all timeouts instead
        """
        now = time.monotonic()
        if starved:
            self._latest = {rank: (beat, now) for rank, (beat, _) in self._latest.items()}
            self._last_progress_time = now
            return None
        # An error that all ranks have is reported by each of them; give them the time for it.
        if any(beat.ended for beat, _ in self._latest.values()):
            return self._reported_cause(ERROR_GRACE)
        return self._find_dead_rank(max(HEARTBEAT_TIMEOUT, 3 * self._interval)) or self._find_stalled_rank(now)

    def _reported_cause(self, ago: float = 0.0) -> str | None:
        """The reason that another rank published when it ended, at least `ago` seconds ago.

        The error of the rank that caused the failure goes before a sentence that another rank found out about it.
        """
        ended = [
            (beat.found, rank, beat)
            for rank, (beat, received) in self._latest.items()
            if beat.ended and (beat.found or time.monotonic() - received >= ago)
        ]
        if not ended:
            return None
        found, rank, beat = min(ended, key=lambda each: each[:2])
        return beat.ended if found else f"{self._name(rank, beat)} ended: {beat.ended}"

    def _find_dead_rank(self, limit: float) -> str | None:
        for rank, (beat, received) in sorted(self._latest.items()):
            seconds = time.monotonic() - received
            if beat.ended is None and seconds > limit:
                return f"{self._name(rank, beat)} died or was cut off: no heartbeat for {seconds:.0f} s"
        return None

    def _find_stalled_rank(self, now: float) -> str | None:
        beats = {rank: beat for rank, (beat, _) in self._latest.items() if beat.ended is None}
        beats[self._rank] = self._own_heartbeat()
        progress = {rank: (*beat.progress, beat.status, beat.training) for rank, beat in beats.items()}
        if progress != self._last_progress:
            self._last_progress, self._last_progress_time = progress, now
        absent = [f"rank {r}" for r in range(self._size) if r != self._rank and r not in self._latest]
        starting = bool(absent) or not all(beat.joined for beat in beats.values())
        limit = self._stall if any(beat.training for beat in beats.values()) else max(self._stall, SETUP_TIMEOUT)
        limit = start.START_TIMEOUT if starting else limit
        if now - self._last_progress_time <= limit:
            return None
        if absent:
            return f"no heartbeat of {', '.join(absent)} within {limit:.0f} s: start them on their hosts, {start.network_hint()}"
        if starting:
            late = [self._name(r, b) for r, b in sorted(beats.items()) if not b.joined]
            return f"{', '.join(late)} did not connect to the other ranks within {limit:.0f} s: {start.network_hint()}"
        # Only the last rank is the cause. Ranks in between, such as the source of a broadcast, did their part and wait.
        least = min(beat.progress for beat in beats.values())
        names = [self._name(r, b, b.status) for r, b in sorted(beats.items()) if b.progress == least]
        if len(names) == len(beats):
            return f"no rank made progress for {limit:.0f} s: {', '.join(names)}"
        # This rank is named in full too: the others repeat the sentence if they read it before they find it themselves.
        return f"the others wait for {', '.join(names)}, stalled for more than {limit:.0f} s"

    @staticmethod
    def _name(rank: int, beat: Heartbeat, *more: str) -> str:
        return f"rank {rank} ({', '.join((beat.host, f'process {beat.process}', *more))})"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def print_end(sentence: str) -> None:
    """Print why this rank ends, and leave it for torchrun's report."""
    text = f"engine.train: {sentence}; the same command continues from the last checkpoint"
    record_error(text)
    print(text, file=sys.stderr, flush=True)
