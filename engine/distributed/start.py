"""The start of a run of several ranks: the key-value store, the network interface, and how a start fails.

A start on several hosts fails mostly because of the network: a firewall between the hosts, or a host name that resolves
to the loopback address. torch reports both as timeouts. Here each is one sentence with host, port and the remedy.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import struct
from contextlib import suppress
from datetime import timedelta
from fcntl import ioctl
from pathlib import Path

import torch.distributed as dist

from dataloaders.ranks import Ranks

START_TIMEOUT = 300.0
"""Seconds in which all ranks must have connected to the store and to each other. torchrun starts them at the same time,
and importing torch from a network file system may take minutes."""

GLOO_INTERFACE, NCCL_INTERFACE = INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name the network interface, of gloo and of NCCL."""

RENDEZVOUS_PORT = 29400
"""torchrun's own, where --rdzv-endpoint names none."""

_NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_SIOCGIFADDR = 0x8915
_ELSEWHERE = "192.0.2.1"
"""An address that no host has (RFC 5737): the default route leads to it."""

log = logging.getLogger(__name__)


def torchrun_hosts_store() -> bool:
    """Whether torchrun's own process hosts the key-value store; otherwise rank 0's process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def attempt() -> str:
    """The number of the attempt, where torchrun's restarts share one store; each other attempt has a store of its own."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if torchrun_hosts_store() else "0"


def check_restarts() -> None:
    """Raise ValueError for restarts by torchrun on several hosts that share a store.

    Each host's torchrun counts its own restarts, so the ranks of a new attempt would read what an earlier one wrote.
    """
    hosts, restarts = (int(os.environ.get(name, 0)) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if hosts > 1 and restarts and torchrun_hosts_store():
        raise ValueError(
            f"torchrun --max-restarts {restarts} on {hosts} hosts needs a new key-value store for each attempt: set the "
            f"environment variable {_NO_SHARED_STORE}=1 for torchrun on every host, or leave --max-restarts out"
        )


def connect(rank: int) -> dist.TCPStore:
    """The key-value store of this attempt; rank 0 hosts it, unless torchrun does.

    Raises ValueError, with host and port, where it cannot be reached.
    """
    host, port = store_address()
    hosts_it = rank == 0 and not torchrun_hosts_store()
    try:
        return dist.TCPStore(
            host, port, is_master=hosts_it, wait_for_workers=False, multi_tenant=True,
            timeout=timedelta(seconds=START_TIMEOUT),
        )  # fmt: skip
    except RuntimeError as error:
        if hosts_it:
            raise ValueError(f"no key-value store at {host}:{port}: {_first_line(error)}; start again") from error
        raise ValueError(
            f"the key-value store at {host}:{port} does not answer within {START_TIMEOUT:.0f} s: open all TCP ports between "
            f"the hosts, and check the address of {host} on this one ({socket.gethostname()})"
        ) from error


def end_torchrun() -> None:
    """End the torchrun that started this process, where its key-value store is lost.

    It would wait for the store for a quarter of an hour, in a call that no signal but SIGKILL interrupts. A torchrun that
    may restart its ranks stays, if its rendezvous answers.
    """
    parent = os.getppid()
    with suppress(OSError):
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"
        if "torchrun" not in command and "torch.distributed.run" not in command:
            return
        if not (restarts and _answers(_rendezvous(command))):
            os.kill(parent, signal.SIGKILL)


def _rendezvous(command: str) -> tuple[str, int] | None:
    """Host and port of the rendezvous in a command line of torchrun whose arguments end with a zero byte; None if absent."""
    match = re.search(r"--rdzv[-_]endpoint[=\0]([^\0]+)", command)
    if match is None:
        return None
    host, _, port = match[1].partition(":")
    return host, int(port or RENDEZVOUS_PORT)


def _answers(address: tuple[str, int] | None) -> bool:
    """Whether a host accepts a connection within some seconds; an unknown one counts as such."""
    if address is None:
        return True
    try:
        socket.create_connection(address, 5).close()
    except OSError:
        return False
    return True


def network_hint() -> str:
    """The end of a sentence about ranks that do not reach each other."""
    host, port = store_address()
    named = ", ".join(f"{name}={os.environ[name]}" for name in INTERFACES if name in os.environ) or "none is set"
    return (
        f"open all TCP ports between the hosts (the key-value store is {host}:{port}), or name the network interface that "
        f"connects them in {' and '.join(INTERFACES)} ({named})"
    )


def choose_interface(ranks: Ranks) -> str | None:
    """Set the interface of gloo where this host's name resolves to loopback, as on Debian (127.0.1.1).

    Otherwise gloo listens on the loopback address, which the other hosts cannot reach. It is the interface that is named for
    NCCL, which finds its own if none is; else the one that routes to the store's host, and on that host itself the only one
    there is, or the one of the default route. A variable that is set stays. Returns its name.
    """
    if ranks.size <= ranks.local_size or GLOO_INTERFACE in os.environ or not _is_loopback(socket.gethostname()):
        return None
    if store_address()[0] in ("localhost", "127.0.0.1", "::1"):
        return None  # all ranks are on this host
    named = os.environ.get(NCCL_INTERFACE, "")
    interface = named if named in _addresses() else _interface_towards(*store_address())
    if interface is None:
        return None
    os.environ[GLOO_INTERFACE] = interface
    if ranks.local == 0:
        log.warning(
            "the name of this host, %s, resolves to a loopback address: %s is set to %s",
            socket.gethostname(), GLOO_INTERFACE, interface,
        )  # fmt: skip
    return interface


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(name)).is_loopback
    except OSError:
        return True  # gloo falls back to loopback where the name is unknown


def _interface_towards(host: str, port: int) -> str | None:
    """The network interface whose address this host uses to reach `host`; None where that is unknown or loopback."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return None
    if not ipaddress.ip_address(address).is_loopback:
        return next((name for name, own in _addresses().items() if own == address), None)
    others = [name for name, own in _addresses().items() if not ipaddress.ip_address(own).is_loopback]
    return others[0] if len(others) == 1 else _interface_towards(_ELSEWHERE, port)


def _addresses() -> dict[str, str]:
    """The IPv4 address of each interface of this host that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
