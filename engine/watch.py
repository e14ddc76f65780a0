"""Nothing hangs: a rank that dies or stalls ends the others within a bounded time, with a sentence that names it.

Each process has a thread that writes a beat into the process group's key-value store and reads the others'. A beat that
stays away is a process or machine that is gone; beats without arrivals at the end of a step are one that is stuck.
Collectives cannot tell: they merely wait, some of them (NCCL's) where no exception can reach.
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

import torch
import torch.distributed as dist

SILENT = 20.0
"""Seconds without a beat after which a rank is taken for dead: below the 30 that torchrun leaves us after its SIGTERM."""

SILENT_AFTER_ERROR = 4.0
"""The same once a collective failed, when it is only asked who was the cause."""

GRACE = 3.0
"""Seconds between hearing why another rank ended and ending for it."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself: beats so far, steps whose end it reached, and why it ended, if it did."""

    count: int
    arrivals: int
    training: bool
    host: str
    process: int
    ended: str | None


class Watch:
    """Watches the other ranks of a run, and is watched.

    stall   seconds in which every rank must reach the end of a step
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
        self._arrivals, self._training = 0, False
        self._events: list[torch.cuda.Event] = []
        self._ended: str | None = None
        self._seen: dict[int, tuple[Beat, float]] = {}
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

    def arrived(self, event: torch.cuda.Event | None = None) -> None:
        """This rank did its part of a step and now waits for the others; on CUDA, once `event` has happened."""
        if event is None:
            self._arrivals += 1
        else:
            self._events.append(event)
        self._training = True

    def rest(self) -> None:
        """Outside the training loop only a rank's death counts: reading data and writing a model take what they take."""
        self._training = False

    def explain(self) -> str | None:
        """After a collective failed: the sentence about the rank that caused it, or None when all are alive."""
        until = time.monotonic() + SILENT_AFTER_ERROR + 4 * self._interval
        while time.monotonic() < until:
            for rank, (beat, heard) in sorted(self._seen.items()):
                if beat.ended:
                    return f"{self._name(rank, beat)} ended: {beat.ended}"
                if beat.ended is None and time.monotonic() - heard > SILENT_AFTER_ERROR:
                    return self._silent(rank, beat, time.monotonic() - heard)
            if self._unreachable:
                return self._unreachable
            time.sleep(self._interval / 2)
        return None

    def close(self, reason: str = "") -> None:
        """Stop watching; the others hear the reason, which is empty for an end in good order."""
        self._stop.set()
        self._thread.join(5)
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        """The last beat."""
        self._ended = reason
        # The store may be gone with the process that kept it: then there is nobody left to tell.
        with suppress(RuntimeError):
            self._beat()
            if reason and self._rank == 0 and not _kept_by_torchrun():
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
                return  # the device failed: the main thread hears it from there, and tells the others in `close`
            try:
                self._beat()
                self._listen()
                self._unreachable = None
                sentence = self._judge(starved=time.monotonic() - last > 3 * self._interval + 2)
            except RuntimeError as error:
                # torchrun keeps the store in its own process; without it, rank 0 does.
                beat = self._seen.get(0)
                torchrun = f"torchrun on {os.environ['MASTER_ADDR']}"
                keeper = self._name(0, beat[0]) if beat and not _kept_by_torchrun() else torchrun
                told = [f"{self._name(r, b)} ended: {b.ended}" for r, (b, _) in sorted(self._seen.items()) if b.ended]
                lost = f"{keeper} died or was cut off: its key-value store is gone ({_first_line(error)})"
                self._unreachable = told[0] if told else lost
                # A run that ended in good order takes the store with it, a moment before this rank leaves.
                sentence = None if self._stop.wait(5) else self._unreachable
            last = time.monotonic()
            if sentence is not None and not self._stop.is_set():
                self._tell(sentence)
                self._finding(f"rank {self._rank} ends: {sentence}")
                return

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(str(self._rank), json.dumps(asdict(self._own_beat())))

    def _own_beat(self) -> Beat:
        return Beat(self._beats, self._arrivals, self._training, socket.gethostname(), os.getpid(), self._ended)

    def _listen(self) -> None:
        now = time.monotonic()
        others = [rank for rank in range(self._size) if rank != self._rank]
        for rank in others:
            if rank not in self._seen and not self._store.check([str(rank)]):
                continue
            beat = Beat(**json.loads(self._store.get(str(rank))))
            before = self._seen.get(rank)
            if before is None or before[0].count != beat.count:
                if before is None or (before[0].arrivals, before[0].training) != (beat.arrivals, beat.training):
                    self._moved = now
                self._seen[rank] = (beat, now)

    def _judge(self, starved: bool) -> str | None:
        """The sentence about a rank that is gone or stuck, if one is; none by a judge that slept himself."""
        now = time.monotonic()
        if starved:
            self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}
            return None
        for rank, (beat, heard) in sorted(self._seen.items()):
            # An error that all ranks have is told by each of them: they get the time to.
            if beat.ended:
                return f"{self._name(rank, beat)} ended: {beat.ended}" if now - heard > GRACE else None
            if beat.ended is None and now - heard > SILENT:
                return self._silent(rank, beat, now - heard)
        arrivals = {rank: beat.arrivals for rank, (beat, _) in self._seen.items() if beat.ended is None}
        arrivals[self._rank] = self._arrivals
        self._moved = now if not self._anyone_training() else self._moved
        if now - self._moved <= self._stall:
            return None
        behind = [rank for rank, count in arrivals.items() if count < max(arrivals.values())]
        if not behind:
            return f"no rank reached the end of a step for {self._stall:.0f} s"
        # The whole name also of this rank: the others repeat the sentence if they hear it before they find out.
        beats = {**{rank: beat for rank, (beat, _) in self._seen.items()}, self._rank: self._own_beat()}
        names = ", ".join(self._name(rank, beats[rank]) for rank in sorted(behind))
        return f"the others wait for {names}, stalled for more than {self._stall:.0f} s"

    def _anyone_training(self) -> bool:
        return self._training or any(beat.training for beat, _ in self._seen.values())

    def _silent(self, rank: int, beat: Beat, seconds: float) -> str:
        return f"{self._name(rank, beat)} died or was cut off: not heard of for {seconds:.0f} s"

    @staticmethod
    def _name(rank: int, beat: Beat) -> str:
        return f"rank {rank} ({beat.host}, process {beat.process})"


def _kept_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def say_end(sentence: str) -> None:
    print(f"engine.train: {sentence}; the same command continues from the last checkpoint", file=sys.stderr, flush=True)


def _end(sentence: str) -> None:
    say_end(sentence)
    os._exit(1)
