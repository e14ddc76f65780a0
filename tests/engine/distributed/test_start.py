"""The end of torchrun, and the choice of a network interface."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from dataloaders.ranks import Ranks
from engine.distributed import start

TWO_HOSTS = Ranks(rank=1, size=2, local=0, local_size=1)


def ended(monkeypatch: pytest.MonkeyPatch, restarts: str, *arguments: str) -> bool:
    """Whether `end_torchrun` ends a process that has the command line of torchrun."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", *arguments], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        start.end_torchrun()
        process.wait(1)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.wait()


def test_a_torchrun_that_cannot_restart_is_ended(monkeypatch: pytest.MonkeyPatch):
    torchrun = "torch.distributed.run"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert not ended(monkeypatch, "3", torchrun, "--rdzv-endpoint", address), "it restarts the ranks"
        assert ended(monkeypatch, "0", torchrun, "--rdzv-endpoint", address)
    assert ended(monkeypatch, "3", torchrun, f"--rdzv_endpoint={address}"), "its rendezvous is gone"
    assert not ended(monkeypatch, "3", torchrun), "its rendezvous is not known"
    assert not ended(monkeypatch, "0", "another program")


@pytest.mark.parametrize(
    ("given", "chosen"),
    [({}, "eth1"), ({"NCCL_SOCKET_IFNAME": "eth0"}, "eth0"), ({"NCCL_SOCKET_IFNAME": "^docker"}, "eth1")],
)
def test_gloo_takes_nccls_interface_or_the_one_to_the_first_host(
    given: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch
):
    place = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    monkeypatch.setattr(os, "environ", {**place, **given})
    monkeypatch.setattr(start, "_is_loopback", lambda name: True)
    monkeypatch.setattr(start, "_addresses", lambda: {"eth0": "192.168.0.2", "eth1": "10.0.0.2"})
    monkeypatch.setattr(start, "_interface_towards", lambda host, port: "eth1")
    assert start.choose_interface(TWO_HOSTS) == chosen
    assert os.environ == {**place, **given, "GLOO_SOCKET_IFNAME": chosen}, "NCCL finds its own"
    assert start.choose_interface(TWO_HOSTS) is None, "a variable that is set stays"
