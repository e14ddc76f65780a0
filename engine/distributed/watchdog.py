"""Nothing hangs: a rank that dies or stalls ends the others within a bounded time, with a sentence that names it.

Each process has a thread that writes a beat into the process group's key-value store and reads the others'. A beat that
stays away is a process or machine that is gone. Beats that tell of no progress are a rank that is stuck, and since all
ranks begin the same collectives in the same order, it is the one that has begun the fewest: the others are in the one
that it never came to. Collectives cannot tell: they merely wait, some of them (NCCL's) where no exception can reach.
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

SILENT = 20.0
"""Seconds without a beat after which a rank is taken for dead: below the 30 that torchrun leaves us after its SIGTERM."""

SILENT_AFTER_ERROR = 4.0
"""The same once a collective failed, when it is only asked who was the cause."""

GRACE = 3.0
"""Seconds between hearing of another rank's error and ending for it."""

SET_UP = 1800.0
"""Seconds without any progress, outside the training loop and in its first step, after which the ranks end. Data are read
and models built there, by one rank while the others wait: it may take long, but not between two signs of progress."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    count        beats so far
    arrivals     steps whose end its device has reached
    collectives  that it has begun
    doing        what it is at, and whether that is the training loop after its first step
    ended        why, if it did: its own error, or (`found`) a sentence about another rank that is the cause
    """

    count: int
    arrivals: int
    collectives: int
    doing: str
    training: bool
    host: str
    process: int
    ended: str | None
    found: bool

    @property
    def progress(self) -> tuple[int, int]:
        """The rank that all others wait for has the least."""
        return self.arrivals, self.collectives


class Watch:
    """Watches the other ranks of a run, and is watched.

    stall   seconds in which some rank must make progress in the training loop; elsewhere they are `SET_UP`, if that is more
    device  of this rank, whose events `arrived` is given
    Raises nothing: a finding ends the process with status 1 from the thread, since the main thread may be waiting for ever.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        stall: float,
        device: torch.device,
        finding: Callable[[str], None] | None = None,
    ) -> None:
        self._rank, self._size, self._stall, self._device = rank, size, stall, device
        # Large worlds beat slower: every rank reads every other's.
        self._interval = min(max(0.5, size / 128), stall / 4)
        self._finding = finding or _end
        self._arrivals, self._training, self._doing = 0, False, "starting"
        self._backends: list[Any] = []
        self._events: list[torch.cuda.Event] = []
        self._ended: str | None = None
        self._found: str | None = None
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[Beat, float]] = {}
        self._standing: dict[int, tuple[int, int, str, bool]] = {}
        self._moved = time.monotonic()
        self._unreachable: str | None = None
        self._stop = threading.Event()
        # A client of its own: the process group's would make a beat wait for the main thread's questions.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60)
        )
        self._store = dist.PrefixStore(f"pite/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._beats = 0
        self._beat()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    def joined(self) -> None:
        """The process group is there: what this rank begins in it is its progress, under any layout of the model."""
        group = dist.distributed_c10d._get_default_group()
        self._backends = [group._get_backend(torch.device(kind)) for kind in {"cpu", self._device.type}]

    def doing(self, what: str) -> None:
        """What this rank is at, for the sentence about it should it stall; each new one is progress."""
        self._doing = what

    def arrived(self, event: torch.cuda.Event | None = None) -> None:
        """This rank did its part of a step and now waits for the others; on CUDA, once `event` has happened."""
        if event is None:
            self._arrivals += 1
        else:
            self._events.append(event)
        self._training = True

    def rest(self) -> None:
        """The training loop is over."""
        self._training, self._doing = False, "finishing the stage"

    def explain(self) -> str | None:
        """After a collective failed: the sentence about the rank that caused it, or None when all are alive."""
        silent = max(SILENT_AFTER_ERROR, 3 * self._interval)
        until = time.monotonic() + silent + 4 * self._interval
        while time.monotonic() < until:
            cause = self._told() or self._anyone_silent(silent) or self._unreachable
            if cause:
                if not self._first_to_find(cause):
                    self._thread.join()  # it says so, and ends the process
                return self._found
            time.sleep(self._interval / 2)
        return None

    def close(self, reason: str = "") -> None:
        """Stop watching; the others hear the reason, which is empty for an end in good order."""
        self._stop.set()
        self._thread.join(5)
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        """The last beat."""
        self._ended = self._found or reason
        # The store may be gone with the process that kept it: then there is nobody left to tell.
        with suppress(RuntimeError):
            self._beat()
            if reason and self._rank == 0 and not kept_by_torchrun():
                time.sleep(3 * self._interval)  # the store goes with this process: let the others read first

    def _work(self) -> None:
        if self._device.type == "cuda":
            # A thread starts on device 0, and asking for an event there would open a context of half a GB for every rank.
            torch.cuda.set_device(self._device)
        last = time.monotonic()
        while not self._stop.wait(self._interval):
            try:
                while self._events and self._events[0].query():
                    self._events.pop(0)
                    self._arrivals += 1
            except RuntimeError:
                # The device failed, which the main thread hears from it. Until it tells the others, nobody is to look dead.
                self._events.clear()
            try:
                self._beat()
                self._listen()
                self._unreachable = None
                sentence = self._judge(starved=time.monotonic() - last > 3 * self._interval + 2)
            except RuntimeError as error:
                # torchrun keeps the store in its own process; without it, rank 0 does.
                beat = self._seen.get(0)
                torchrun = f"torchrun on {os.environ['MASTER_ADDR']}"
                keeper = self._name(0, beat[0]) if beat and not kept_by_torchrun() else torchrun
                lost = f"{keeper} died or was cut off: its key-value store is gone ({_first_line(error)})"
                self._unreachable = self._told() or lost
                # A run that ended in good order takes the store with it, a moment before this rank leaves.
                sentence = None if self._stop.wait(5) else self._unreachable
            last = time.monotonic()
            if sentence is not None and not self._stop.is_set() and self._first_to_find(sentence):
                self._tell(sentence)
                self._finding(f"rank {self._rank} ends: {sentence}")
                return

    def _first_to_find(self, sentence: str) -> bool:
        """Whether the sentence is this rank's; the main thread and ours may find one at the same moment."""
        with self._lock:
            first = self._found is None
            self._found = self._found or sentence
            return first

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(str(self._rank), json.dumps(asdict(self._own_beat())))

    def _own_beat(self) -> Beat:
        begun = sum(backend._get_sequence_number_for_group() for backend in self._backends)
        return Beat(
            self._beats, self._arrivals, begun, self._doing, self._training,
            socket.gethostname(), os.getpid(), self._ended, self._found is not None,
        )  # fmt: skip

    def _listen(self) -> None:
        others = [rank for rank in range(self._size) if rank != self._rank]
        there = [rank for rank in others if rank in self._seen or self._store.check([str(rank)])]
        if not there:
            return
        for rank, text in zip(there, self._store.multi_get([str(rank) for rank in there])):
            beat = Beat(**json.loads(text))
            if rank not in self._seen or self._seen[rank][0].count != beat.count:
                self._seen[rank] = (beat, time.monotonic())

    def _judge(self, starved: bool) -> str | None:
        """The sentence about a rank that is gone or stuck, if one is; none by a judge that slept himself."""
        now = time.monotonic()
        if starved:
            self._seen, self._moved = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}, now
            return None
        # An error that all ranks have is told by each of them: they get the time to.
        if any(beat.ended for beat, _ in self._seen.values()):
            return self._told(GRACE)
        return self._anyone_silent(max(SILENT, 3 * self._interval)) or self._anyone_stuck(now)

    def _told(self, ago: float = 0.0) -> str | None:
        """What others said when they ended: an error, at least `ago` seconds back, or else what they found out."""
        ended = [
            (beat.found, rank, beat)
            for rank, (beat, heard) in self._seen.items()
            if beat.ended and (beat.found or time.monotonic() - heard >= ago)
        ]
        if not ended:
            return None
        found, rank, beat = min(ended, key=lambda each: each[:2])
        return beat.ended if found else f"{self._name(rank, beat)} ended: {beat.ended}"

    def _anyone_silent(self, limit: float) -> str | None:
        for rank, (beat, heard) in sorted(self._seen.items()):
            seconds = time.monotonic() - heard
            if beat.ended is None and seconds > limit:
                return f"{self._name(rank, beat)} died or was cut off: not heard of for {seconds:.0f} s"
        return None

    def _anyone_stuck(self, now: float) -> str | None:
        beats = {rank: beat for rank, (beat, _) in self._seen.items() if beat.ended is None}
        beats[self._rank] = self._own_beat()
        standing = {rank: (*beat.progress, beat.doing, beat.training) for rank, beat in beats.items()}
        if standing != self._standing:
            self._standing, self._moved = standing, now
        limit = self._stall if any(beat.training for beat in beats.values()) else max(self._stall, SET_UP)
        if now - self._moved <= limit:
            return None
        absent = [f"rank {r}" for r in range(self._size) if r != self._rank and r not in self._seen]
        if absent:
            return f"the others wait for {', '.join(absent)}, not heard of since the start {limit:.0f} s ago"
        # Those in between have done their part for the hindmost, as the source of a broadcast has, and wait as well.
        least = min(beat.progress for beat in beats.values())
        names = [self._name(r, b, b.doing) for r, b in sorted(beats.items()) if b.progress == least]
        if len(names) == len(beats):
            return f"no rank got any further for {limit:.0f} s: {', '.join(names)}"
        # The whole name also of this rank: the others repeat the sentence if they hear it before they find out.
        return f"the others wait for {', '.join(names)}, stalled for more than {limit:.0f} s"

    @staticmethod
    def _name(rank: int, beat: Beat, *more: str) -> str:
        return f"rank {rank} ({', '.join((beat.host, f'process {beat.process}', *more))})"


def kept_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def say_end(sentence: str) -> None:
    print(f"engine.train: {sentence}; the same command continues from the last checkpoint", file=sys.stderr, flush=True)


def _end(sentence: str) -> None:
    say_end(sentence)
    os._exit(1)
