"""Threads query CUDA events on their rank's device: on device 0 each rank would create a context of half a GB."""

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
    """A CUDA event that has happened. It records which device was current in the threads that query it."""

    device = DEVICE

    def __init__(self, current: threading.local) -> None:
        self._current = current
        self.queried_on: list[torch.device] = []
        self.queried = threading.Event()

    def record(self) -> None:
        pass

    def query(self) -> bool:
        self.queried_on.append(getattr(self._current, "device", torch.device("cuda", 0)))
        self.queried.set()
        return True


@pytest.fixture
def event(monkeypatch) -> Event:
    """An event. As in torch, each thread has its own current device, at first device 0."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", torch.device(device)))
    return Event(current)


def test_the_watchdog(event: Event, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(port))
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    watchdog = Watchdog(0, 1, stall=60, device=DEVICE, on_failure=lambda _: None)
    watchdog.step_done(event)
    assert event.queried.wait(30)
    watchdog.close()
    assert event.queried_on == [DEVICE]
    del store


def test_the_writer_of_checkpoints(tmp_path: Path, monkeypatch):
    """It writes from host memory and uses no stream of a device."""
    parameters, optimizer = small_run()
    used_by: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: used_by.append(threading.current_thread().name))
    with CheckpointWriter(tmp_path, {}, keep=1) as writer:
        writer.save(1, parameters, optimizer)
        writer.wait()
    assert not used_by
    assert newest_checkpoint(tmp_path)[0].step == 1
