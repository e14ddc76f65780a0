"""Ranks that die, stall or are killed: the others say which, and the run continues where it was, on any number."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import metrics
from tests.engine.ranks import Ranks, train
from tests.engine.test_resume import ROOT, SLOWLY, assert_equal_runs, numbers
from tests.engine.workspace import train_arguments

LATER = """
import time
from engine import loop
compute, calls = loop.compute_losses, []
def stalling(*rest):
    calls.append(0)
    if rank == 1 and len(calls) == 3: time.sleep(1000)
    return compute(*rest)
loop.compute_losses = stalling"""

SLOW = SLOWLY.replace("0.2", "0.1")
END_WITHIN = 30


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks train when nobody disturbs them."""
    output = tmp_path_factory.mktemp("two")
    ranks = train(2, output / "logs", train_arguments(workspace, output, "1"))
    assert ranks.wait() == [0, 0], ranks.said(0)
    return output


def after_a_random_while(output: Path, running: Ranks | subprocess.Popen[str]) -> None:
    """Wait for the first checkpoint and then for anything between nothing and two steps."""
    deadline = time.monotonic() + 120
    while not list(output.glob("stage1/checkpoints/step-*")):
        assert time.monotonic() < deadline
        if isinstance(running, subprocess.Popen):
            assert running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))


def test_one_rank_of_torchrun_is_killed(workspace: Path, tmp_path: Path, uninterrupted: Path):
    """The very command that users type; what it ends with names the rank, and the run goes on to the same end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tell = (
        f"import os, pathlib; pathlib.Path({str(tmp_path)!r}, 'pid' + os.environ['RANK']).write_text(str(os.getpid()))"
    )
    program = f"import sys; {tell}; exec({SLOW!r}); from engine.train import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "program.py").write_text(program)
    run = subprocess.Popen(
        [*torchrun, str(tmp_path / "program.py"), *train_arguments(workspace, tmp_path, "1")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    after_a_random_while(tmp_path, run)
    victim = int((tmp_path / "pid1").read_text())
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, error = run.communicate(timeout=END_WITHIN)
    assert time.monotonic() - killed < END_WITHIN
    assert run.returncode != 0
    assert f"process {victim}) died or was cut off" in error, error
    assert "rank 0 ends: rank 1 (" in error
    assert not (tmp_path / "stage1" / "final").exists()
    again = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path, "1"))
    assert again.wait() == [0, 0], again.said(0)
    assert_equal_runs(tmp_path, uninterrupted)


def test_all_ranks_are_killed_and_other_numbers_of_ranks_continue(workspace: Path, tmp_path: Path, uninterrupted: Path):
    killed = tmp_path / "killed"
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, killed, "1"), SLOW)
    after_a_random_while(killed, ranks)
    for process in ranks.processes:
        process.kill()
    assert ranks.wait() == [-signal.SIGKILL] * 2
    expected = numbers(uninterrupted)
    for size in (1, 2, 4):
        output = tmp_path / str(size)
        shutil.copytree(killed, output)
        again = train(size, tmp_path / f"logs{size}", train_arguments(workspace, output, "1"))
        assert again.wait() == [0] * size, again.said(0)
        assert "continuing after step" in again.said(0)
        if size == 2:
            assert_equal_runs(output, uninterrupted)
        found = numbers(output)
        assert [line[-1] for line in found] == [line[-1] for line in expected], "tokens of each global batch"
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


def test_a_stalled_rank_is_named_and_ends_the_run(workspace: Path, tmp_path: Path):
    arguments = train_arguments(workspace, tmp_path, "1", stall_timeout=10)
    ranks = train(2, tmp_path / "logs", arguments, LATER)
    started = time.monotonic()
    assert ranks.wait(60) == [1, 1]
    assert time.monotonic() - started < 60
    assert "the others wait for rank 1 (" in ranks.said(0)
    assert "stalled for more than 10 s" in ranks.said(0)
    assert "stalled for more than 10 s" in ranks.said(1)
    steps = [line["step"] for line in metrics.read(tmp_path / "stage1" / "metrics.jsonl")]
    assert steps == [1, 2]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_is_named(workspace: Path, tmp_path: Path, victim: int):
    """Rank 0 also keeps the store where there is no torchrun."""
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path, "1"), SLOW)
    after_a_random_while(tmp_path, ranks)
    ranks.processes[victim].kill()
    codes = ranks.wait(END_WITHIN)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    named = f"rank {1 - victim} ends: rank {victim} ("
    assert named in ranks.said(1 - victim)
    assert f"process {ranks.processes[victim].pid}) died or was cut off" in ranks.said(1 - victim)
    assert "Traceback" not in ranks.said(1 - victim)


def test_an_error_of_one_rank_is_told_by_the_others(workspace: Path, tmp_path: Path):
    full = """
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
def full(*rest): raise OSError(28, "No space left on device")
HuggingFaceStorageWriter.write_data = full"""
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path, "1"), full + SLOW)
    assert ranks.wait(END_WITHIN) == [1, 1]
    assert "checkpoint of step 2 could not be written (No space left on device); there is none yet" in ranks.said(0)
    assert "rank 1 ends: rank 0 (" in ranks.said(1)
    assert "No space left on device" in ranks.said(1)
