"""Threads that ask for CUDA events do so on their rank's device: on device 0 each rank would open a context of half a GB."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.checkpoint import CheckpointWriter, newest_checkpoint
from engine.distributed.watchdog import Watchdog
from tests.engine.test_checkpoint import small_run

DEVICE = torch.device("cuda", 3)


class Event:
    """A CUDA event that has happened, and notes which device was current in the threads that ask for it."""

    device = DEVICE

    def __init__(self, current: threading.local) -> None:
        self._current = current
        self.asked_on: list[torch.device] = []
        self.asked = threading.Event()

    def record(self) -> None:
        pass

    def query(self) -> bool:
        self.asked_on.append(getattr(self._current, "device", torch.device("cuda", 0)))
        self.asked.set()
        return True


@pytest.fixture
def event(monkeypatch) -> Event:
    """The one event; torch's current device is each thread's own, and first 0."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", torch.device(device)))
    return Event(current)


def test_the_watch(event: Event, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(port))
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    watchdog = Watchdog(0, 1, stall=60, device=DEVICE, on_failure=lambda _: None)
    watchdog.step_done(event)
    assert event.asked.wait(30)
    watchdog.close()
    assert event.asked_on == [DEVICE]
    del store


def test_the_writer_of_checkpoints(tmp_path: Path, monkeypatch):
    """It writes what is in host memory, and asks for no stream of a device."""
    parameters, optimizer = small_run()
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: asked.append(threading.current_thread().name))
    with CheckpointWriter(tmp_path, {}, keep=1) as writer:
        writer.save(1, parameters, optimizer)
        writer.wait()
    assert not asked
    assert newest_checkpoint(tmp_path)[0].step == 1
