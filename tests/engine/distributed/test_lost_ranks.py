"""Ranks that die, stall or are killed: the others name them, and the run resumes, with any number of ranks."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.distributed import start, watchdog
from engine.metrics import read_metrics
from engine.preemption import MARKER
from engine.train import main
from tests import SOURCE_PATH
from tests.engine.distributed.ranks import Ranks, train
from tests.engine.test_resume import SLOWLY, assert_equal_runs, numbers
from tests.engine.workspace import train_arguments

STALL_IN_A_STEP = """
import time
from pite import decoder
compute, calls = decoder.DecoderLayer._compute, []
def stalling(*rest):
    calls.append(0)
    if rank == 1 and len(calls) == 6: time.sleep(1000)
    return compute(*rest)
decoder.DecoderLayer._compute = stalling"""

STALL_BEFORE_THE_FIRST = """
import time
from engine import job
from engine.distributed import start, watchdog
watchdog.SETUP_TIMEOUT = 4
build = job.build_model
job.build_model = lambda *rest, **named: time.sleep(1000) if rank == 1 else build(*rest, **named)"""

SLOW = SLOWLY.replace("0.2", "0.1")
END_WITHIN = 90


@pytest.fixture(scope="module")
def stage1(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of stage 1, from which stage 2 starts."""
    output = tmp_path_factory.mktemp("one")
    assert main(train_arguments(workspace, output, "1", epochs=1)) == 0
    return output / "stage1" / "final"


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path, tmp_path_factory: pytest.TempPathFactory, stage1: Path) -> Path:
    """An undisturbed run of stage 2 on two ranks."""
    output = tmp_path_factory.mktemp("two")
    ranks = train(2, output / "logs", train_arguments(workspace, output, "2", init=stage1))
    assert ranks.wait() == [0, 0], ranks.stderr(0)
    return output


def after_a_random_while(output: Path, running: Ranks | subprocess.Popen[str]) -> None:
    """Wait for the first checkpoint and then for a random time of up to two steps."""
    deadline = time.monotonic() + 120
    while not list(output.glob("stage*/checkpoints/step-*")):
        assert time.monotonic() < deadline
        if isinstance(running, subprocess.Popen):
            assert running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))


def torchrun(output: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """torchrun as users start it, on two ranks with slow steps; each rank writes its process id and status to files."""
    program = f"""
import os, pathlib, sys
def note(what, number):
    pathlib.Path({str(output)!r}, what + os.environ['RANK']).write_text(str(number))
note("process", os.getpid())
exec({SLOW!r})
from engine.preemption import MARKER
from engine.train import main
status = main(sys.argv[1:])
note("status", status)
sys.exit(status)"""
    (output / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(output / "program.py"), *arguments],
        env={**os.environ, "PYTHONPATH": SOURCE_PATH, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_rank_of_torchrun_is_killed(workspace: Path, tmp_path: Path, stage1: Path, uninterrupted: Path):
    """The message names the rank, and the resumed run equals the uninterrupted one."""
    arguments = train_arguments(workspace, tmp_path, "2", init=stage1)
    run = torchrun(tmp_path, arguments)
    after_a_random_while(tmp_path, run)
    victim = int((tmp_path / "process1").read_text())
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, error = run.communicate(timeout=END_WITHIN)
    assert time.monotonic() - killed < 40, "the limit that docs/cluster.md names"
    assert run.returncode != 0
    assert f"process {victim}) died or was cut off" in error, error
    assert "rank 0 ends: rank 1 (" in error
    assert not (tmp_path / "stage2" / "final").exists()
    again = train(2, tmp_path / "logs", arguments)
    assert again.wait() == [0, 0], again.stderr(0)
    assert_equal_runs(tmp_path, uninterrupted, 2)


def test_torchrun_gets_sigterm(workspace: Path, tmp_path: Path, stage1: Path):
    """As from a scheduler that preempts, which may signal the ranks too: all save and exit 0."""
    run = torchrun(tmp_path, train_arguments(workspace, tmp_path, "2", init=stage1, checkpoint_every=1000))
    deadline = time.monotonic() + 120
    while not numbers(tmp_path, 2):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    with suppress(ProcessLookupError):
        for _ in range(5):
            os.kill(int((tmp_path / "process1").read_text()), signal.SIGTERM)
            time.sleep(0.02)
    _, error = run.communicate(timeout=END_WITHIN)
    assert [(tmp_path / f"status{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    (saved,) = (tmp_path / "stage2" / "checkpoints").iterdir()
    step = int(saved.name.split("-")[1])
    assert f"stop requested (SIGTERM): saved step {step} of 6 in {saved.parent}; the same command continues" in error
    assert len(numbers(tmp_path, 2)) == step
    assert json.loads((tmp_path / MARKER).read_text()) == {"stage": 2, "step": step}
    assert not (tmp_path / "stage2" / "final").exists()


def test_all_ranks_are_killed_and_another_number_of_ranks_resumes(
    workspace: Path, tmp_path: Path, stage1: Path, uninterrupted: Path
):
    killed = tmp_path / "killed"
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, killed, "2", init=stage1), SLOW)
    after_a_random_while(killed, ranks)
    for process in ranks.processes:
        process.kill()
    assert ranks.wait() == [-signal.SIGKILL] * 2
    expected = numbers(uninterrupted, 2)
    for size in (1, 2, 4):
        output = tmp_path / str(size)
        shutil.copytree(killed, output)
        again = train(size, tmp_path / f"logs{size}", train_arguments(workspace, output, "2", init=stage1))
        assert again.wait() == [0] * size, again.stderr(0)
        assert "continuing after step" in again.stderr(0)
        if size == 2:
            assert_equal_runs(output, uninterrupted, 2)
        found = numbers(output, 2)
        assert [line[-1] for line in found] == [line[-1] for line in expected], "tokens of each global batch"
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    "parallel, size, code, status, steps",
    [
        ("ddp", 2, STALL_IN_A_STEP, "computing step 3", 2),
        ("fsdp", 3, STALL_IN_A_STEP, "computing step 3", 2),
        ("fsdp", 3, STALL_BEFORE_THE_FIRST, "building the model of stage 1", 0),
    ],
)
def test_a_stalled_rank_is_named_and_ends_the_run(
    workspace: Path, tmp_path: Path, parallel: str, size: int, code: str, status: str, steps: int
):
    """By every rank, itself included: it alone has not begun the collective in which the others wait."""
    arguments = train_arguments(workspace, tmp_path, "1", stall_timeout=4, checkpoint_every=1000, parallel=parallel)
    ranks = train(size, tmp_path / "logs", arguments, code)
    assert ranks.wait(END_WITHIN) == [1] * size
    whole_name = f"process {ranks.processes[1].pid}, {status})"
    for rank in range(size):
        (sentence,) = re.findall(r"engine.train: (.*);", ranks.stderr(rank))  # once, whichever thread finds it
        start = f"rank {rank} ends: the others wait for rank 1 ("
        assert sentence.startswith(start) and sentence.endswith(f"{whole_name}, stalled for more than 4 s"), sentence
    assert [line["step"] for line in read_metrics(tmp_path / "stage1" / "metrics.jsonl")] == [*range(1, steps + 1)]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """A key-value store for the watchdogs of several ranks in this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_a_rank_whose_device_fails_does_not_look_dead(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch):
    class Event:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(watchdog, "HEARTBEAT_TIMEOUT_AFTER_ERROR", 1.0)
    ranks = [watchdog.Watchdog(rank, 2, 60.0, torch.device("cpu"), pytest.fail) for rank in (0, 1)]
    time.sleep(1.2)  # they have read each other's heartbeats
    ranks[0].step_done(Event())
    assert ranks[0].diagnose() is None
    for each in ranks:
        each.close()


@pytest.mark.parametrize(
    "size, joined, expected",
    [
        (2, True, r"no rank made progress for 2 s: .*, layer 3\).*, starting\)"),
        (
            2,
            False,
            r"rank 0 .*, rank 1 .* did not connect to the other ranks within 2 s: .*127\.0\.0\.1:\d+\).*_IFNAME",
        ),
        (3, False, r"no heartbeat of rank 2 within 2 s: .*127\.0\.0\.1:\d+\).* GLOO_SOCKET_IFNAME"),
    ],
)
def test_progress_before_the_first_step_is_not_a_stall(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, size: int, joined: bool, expected: str
):
    """Two ranks in one process: one makes progress while the other waits, then stops. A third rank never starts."""
    monkeypatch.setattr(watchdog, "SETUP_TIMEOUT", 1.5)
    monkeypatch.setattr(start, "START_TIMEOUT", 1.5)
    found: list[str] = []
    working, waiting = (watchdog.Watchdog(rank, size, 1.0, torch.device("cpu"), found.append) for rank in (0, 1))
    working._joined = waiting._joined = joined
    for layer in range(4):
        working.set_status(f"layer {layer}")
        time.sleep(0.5)
        assert not found
    until = time.monotonic() + 10
    while len(found) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(found) == 2 and all(re.search(expected, sentence) for sentence in found), found
    for each in (working, waiting):
        each.close()


def test_a_store_that_does_not_answer_is_named(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch):
    """Its host has lost power: a request to it would hang for a quarter of an hour. A shorter pause is survived."""
    monkeypatch.setattr(watchdog, "STORE_TIMEOUT", 3.0)
    found: list[str] = []
    rank = watchdog.Watchdog(0, 1, 60.0, torch.device("cpu"), found.append)
    write, answers = rank._write_heartbeat, threading.Event()
    monkeypatch.setattr(rank, "_write_heartbeat", lambda: (answers.wait(20), write()))
    time.sleep(2)
    answers.set()
    time.sleep(1.5)
    assert not found, "a pause of 2 s"
    answers.clear()
    until = time.monotonic() + 15
    while not found and time.monotonic() < until:
        time.sleep(0.1)
    (sentence,) = found
    assert re.search(r"rank 0 .*127\.0\.0\.1 was cut off: its key-value store does not answer for \d s", sentence)
    before = time.monotonic()
    rank.close("lost")
    assert time.monotonic() - before < 15, "leaving does not wait for the store"
    answers.set()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_is_named(workspace: Path, tmp_path: Path, victim: int):
    """Without torchrun, rank 0 also hosts the store."""
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path, "1"), SLOW)
    after_a_random_while(tmp_path, ranks)
    ranks.processes[victim].kill()
    codes = ranks.wait(END_WITHIN)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    named = f"rank {1 - victim} ends: rank {victim} ("
    assert named in ranks.stderr(1 - victim)
    assert f"process {ranks.processes[victim].pid}) died or was cut off" in ranks.stderr(1 - victim)
    assert "Traceback" not in ranks.stderr(1 - victim)


def test_an_error_of_one_rank_is_reported_by_the_others(workspace: Path, tmp_path: Path):
    full = """
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
def full(*rest): raise OSError(28, "No space left on device")
HuggingFaceStorageWriter.write_data = full"""
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path, "1"), full + SLOW)
    assert ranks.wait(END_WITHIN) == [1, 1]
    assert "checkpoint of step 2 could not be written (No space left on device); there is none yet" in ranks.stderr(0)
    assert "rank 1 ends: rank 0 (" in ranks.stderr(1)
    assert "No space left on device" in ranks.stderr(1)
