"""Two hosts on one machine: network namespaces with a cable (a veth pair) between them, each with its own host name.

As on Debian, a host's own name resolves to 127.0.1.1 on that host.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests import SOURCE_PATH

CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """Why this machine cannot make the two hosts; empty if it can."""
    if not all(map(shutil.which, ("ip", "unshare", "mount"))):
        return "iproute2 and util-linux are not installed"
    name = f"pite{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no privilege to make network namespaces ({made.stderr.strip()})"
    try:
        probe = subprocess.run(
            ["ip", "netns", "exec", name, "unshare", "--uts", "true"], capture_output=True, text=True
        )
        return "" if not probe.returncode else f"no privilege to enter namespaces ({probe.stderr.strip()})"
    finally:
        _ip("netns", "delete", name)


@dataclass
class Started:
    """A command on a host, and the file with its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None where it still runs after `seconds`."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    @property
    def output(self) -> str:
        return self.log.read_text()


@dataclass
class Host:
    """A host in a network namespace."""

    name: str
    namespace: str
    address: str
    hosts: Path
    started: list[Started] = field(default_factory=list)

    def start(self, command: Sequence[object], log: Path, **environment: str) -> Started:
        """Start a command; its output goes to `log`."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c"]
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*enter, script, "sh", self.name, str(self.hosts), *map(str, command)],
                env={**os.environ, "PYTHONPATH": SOURCE_PATH, "OMP_NUM_THREADS": "1", **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(Started(process, log))
        return self.started[-1]

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def kill(self) -> None:
        """End all processes of this host at once."""
        while processes := self.processes():
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def enter(self) -> None:
        """Move this process's network into the host."""
        with Path("/run/netns", self.namespace).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


class Cluster:
    """Two hosts, `hosta` and `hostb`, in a `with` block; `cut` and `mend` their cable."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.hosts = folder, []

    def __enter__(self) -> Cluster:
        subnet = f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}"
        addresses = {f"host{letter}": f"{subnet}.{number}" for number, letter in enumerate("ab", 1)}
        for name, address in addresses.items():
            file = self._folder / f"{name}.hosts"
            others = [f"{other} {known}" for known, other in addresses.items() if known != name]
            file.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]) + "\n")
            host = Host(name, f"pite{os.getpid()}{name[-1]}", address, file)
            _ip("netns", "add", host.namespace)
            self.hosts.append(host)
        a, b = self.hosts
        _ip("link", "add", "eth0", "netns", a.namespace, "type", "veth", "peer", "name", "eth0", "netns", b.namespace)
        for host in self.hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        self.mend()
        return self

    def cut(self) -> None:
        """Pull the cable: packets vanish, and no connection is closed."""
        _ip("-n", self.hosts[1].namespace, "link", "set", "eth0", "down")

    def mend(self) -> None:
        for host in self.hosts:
            _ip("-n", host.namespace, "link", "set", "eth0", "up")

    def lose(self, host: Host) -> None:
        """Take a host's power: its cable is silent, and all its processes are gone."""
        self.cut()
        host.kill()

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
            _ip("netns", "delete", host.namespace)


def torchrun(*flags: str, nodes: str = "2", ranks: int = 1) -> list[str]:
    """The start of a command of torchrun for both hosts, which meet at hosta."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "hosta:29500", "--rdzv-id", "pite"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", str(ranks)]
    return [*start, *meet, *flags]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
