"""Hosts that are lost: the others name them within their bounds, and the same command continues with equal losses.

All tests train one stage in one folder, each a part of it, so that each also continues what the one before left.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoint import newest_checkpoint
from engine.metrics import read_metrics
from engine.train import main
from tests.cluster.hosts import Cluster, Host, Started, torchrun
from tests.engine.workspace import train_arguments

NUMBERS = ("loss", "ce", "l1", "gradient_norm")
BUSY = 20.0
"""Seconds that a busy machine may add to a bound."""

PROGRAM = """
import os, pathlib, sys, time
from engine import loop
compute = loop.compute_losses
loop.compute_losses = lambda *rest: (time.sleep(0.25), compute(*rest))[1]
from engine.distributed.errors import exit_process
from engine.train import main
pathlib.Path(sys.argv[1], "process" + os.environ["RANK"]).write_text(str(os.getpid()))
exit_process(main(sys.argv[2:]))
"""
"""engine.train with slow steps; each rank writes its process id to a file."""

EPOCHS = 20
STEPS = 3 * EPOCHS


class Training:
    """One stage on both hosts, in one folder."""

    def __init__(self, cluster: Cluster, workspace: Path, folder: Path) -> None:
        self.cluster, self.workspace, self.folder = cluster, workspace, folder
        self.output = folder / "two"
        (folder / "program.py").write_text(PROGRAM)
        self._starts = 0

    def start(self, *flags: str, nodes: str = "2", own_store: bool = False, **settings: object) -> list[Started]:
        """Start torchrun on both hosts; with `own_store` each attempt has a key-value store of its own."""
        self._starts += 1
        arguments = train_arguments(self.workspace, self.output, "1", epochs=EPOCHS, **settings)
        command = [*torchrun(*flags, nodes=nodes), self.folder / "program.py", self.folder, *arguments]
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if own_store else {}
        return [
            host.start(command, self.folder / f"{host.name}-{self._starts}.log", **variables)
            for host in self.cluster.hosts
        ]

    def process(self, rank: int) -> int:
        return int((self.folder / f"process{rank}").read_text())

    def after_steps(self, started: list[Started], steps: int = 4) -> int:
        """Wait until this many further steps are done; returns the number of all."""
        before, until = self.steps(), time.monotonic() + 120
        while self.steps() < before + steps:
            assert time.monotonic() < until and all(each.process.poll() is None for each in started), _all(started)
            time.sleep(0.05)
        return self.steps()

    def steps(self) -> int:
        lines = read_metrics(self.output / "stage1" / "metrics.jsonl")
        return int(lines[-1]["step"]) if lines else 0

    def check_equal(self, alone: list[dict[str, float]]) -> None:
        """Each step is there once and equals the step of one process; the newest checkpoint is whole."""
        lines = read_metrics(self.output / "stage1" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
        for one, line in zip(alone, lines):
            for name in NUMBERS:
                assert line[name] == pytest.approx(one[name], rel=1e-5), (name, line["step"])
        newest, damaged = newest_checkpoint(self.output / "stage1" / "checkpoints")
        assert newest is not None and not damaged


def _all(started: list[Started]) -> str:
    return "\n".join(each.output for each in started)


@pytest.fixture(scope="module")
def alone(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of one process."""
    output = tmp_path_factory.mktemp("alone")
    assert main(train_arguments(workspace, output, "1", epochs=EPOCHS, checkpoint_every=1000)) == 0
    return read_metrics(output / "stage1" / "metrics.jsonl")


@pytest.fixture(scope="module")
def shared(cluster: Cluster, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(cluster, workspace, tmp_path_factory.mktemp("training"))


@pytest.fixture
def training(shared: Training, cluster: Cluster) -> Iterator[Training]:
    cluster.mend()
    yield shared
    for host in cluster.hosts:
        host.kill()


def ended(started: Started, within: float, since: float) -> float:
    """Seconds from `since` until a line of its output names why a rank ends."""
    until = since + within + BUSY
    while "engine.train: rank" not in started.output:
        assert time.monotonic() < until, started.output
        time.sleep(0.1)
    return time.monotonic() - since


def named(started: Started) -> str:
    return re.findall(r"engine\.train: (rank \d ends: .*)", started.output)[0]


def gone(host: Host, process: int, within: float) -> None:
    until = time.monotonic() + within
    while process in host.processes():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_cable_of_the_second_host_is_cut(training: Training, alone: list[dict[str, float]]):
    started = training.start()
    training.after_steps(started)
    assert "GLOO_SOCKET_IFNAME is set to eth0" in started[1].output, "127.0.1.1"
    assert "2 ranks on 2 hosts (hosta, hostb)" in started[0].output
    process, cut = training.process(0), time.monotonic()
    training.cluster.cut()
    seconds = ended(started[0], 40, cut)
    assert re.search(r"rank 0 ends: rank 1 \(hostb, process \d+\) died or was cut off", named(started[0]))
    gone(training.cluster.hosts[0], process, 10)
    print(f"first host ends after {seconds:.1f} s")
    training.check_equal(alone)


def test_the_store_s_host_loses_power(training: Training, alone: list[dict[str, float]]):
    """Its connections are never closed. The other rank ends, and torchrun, which would wait for TCP, with it."""
    started = training.start()
    training.after_steps(started)
    assert "continuing after step" in started[0].output
    lost = time.monotonic()
    training.cluster.lose(training.cluster.hosts[0])
    print(f"second host ends after {ended(started[1], 75, lost):.1f} s")
    assert "rank 1 ends: torchrun on hosta was cut off: its key-value store does not answer" in named(started[1])
    assert started[1].wait(10 + BUSY) is not None, "torchrun"
    assert not training.cluster.hosts[1].processes()
    training.check_equal(alone)


def test_a_process_is_stopped(training: Training, alone: list[dict[str, float]]):
    started = training.start(stall_timeout=10)
    training.after_steps(started)
    stopped = time.monotonic()
    os.kill(training.process(1), signal.SIGSTOP)
    print(f"first host ends after {ended(started[0], 40, stopped):.1f} s")
    assert re.search(r"rank 0 ends: .*rank 1 \(hostb, process \d+", named(started[0]))
    assert started[0].wait(10 + BUSY) is not None
    sentence = started[0].output.rstrip().splitlines()[-2]
    assert "engine.train: rank 0 ends:" in sentence and "rank 1 (hostb" in sentence, "torchrun's last line but one"
    training.check_equal(alone)


def test_torchrun_restarts_the_ranks(training: Training, alone: list[dict[str, float]]):
    """A rank is killed: both hosts start again, without an operator, and train to the end."""
    started = training.start("--max-restarts", "1", own_store=True)
    training.after_steps(started)
    os.kill(training.process(1), signal.SIGKILL)
    assert [each.wait(90 + BUSY) for each in started] == [0, 0], _all(started)
    assert started[0].output.count("2 ranks on 2 hosts") == 2
    assert started[0].output.count("continuing after step") == 2
    assert training.steps() == STEPS
    training.check_equal(alone)


def test_restarts_with_a_shared_store_are_refused(training: Training):
    started = training.start("--max-restarts", "1", "--monitor-interval", "0.1")
    assert [each.wait(60 + BUSY) for each in started] == [1, 1]
    assert "set the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in started[0].output


def test_a_host_goes_on_alone(cluster: Cluster, workspace: Path, tmp_path: Path, alone: list[dict[str, float]]):
    """With --nnodes 1:2, after the other host has lost power."""
    cluster.mend()
    training = Training(cluster, workspace, tmp_path)
    quick = ["--rdzv-conf", "last_call_timeout=8,keep_alive_interval=2,keep_alive_max_attempt=3"]
    try:
        started = training.start("--max-restarts", "3", *quick, nodes="1:2", own_store=True)
        training.after_steps(started)
        assert "2 ranks on 2 hosts" in started[0].output
        cluster.lose(cluster.hosts[1])
        assert started[0].wait(150 + BUSY) == 0, started[0].output
        assert re.search(r"rank 0 ends: rank 1 \(hostb, process \d+\) died or was cut off", named(started[0]))
        assert "1 rank on 1 host (hosta)" in started[0].output and training.steps() == STEPS
        training.check_equal(alone)
    finally:
        for host in cluster.hosts:
            host.kill()
