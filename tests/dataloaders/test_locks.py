"""Locks between processes, and file systems without locks."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataloaders import locks
from dataloaders.locks import lock

HOLD = """
import sys, time, pathlib
from dataloaders.locks import lock
with lock(pathlib.Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dataloaders.locks.fcntl.flock", refuse)
    monkeypatch.setattr(locks, "_warned", set())


def test_a_lock_is_held_by_one_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(BlockingIOError):
        lock(tmp_path / ".lock", "")
    holder.kill()
    with lock(tmp_path / ".lock", "", wait=True) as after_a_kill:
        assert after_a_kill.held, "a kill releases the lock"


def test_a_process_that_waits_for_a_removed_file_locks_the_new_one(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from dataloaders.locks import lock\n"
        "path = pathlib.Path(sys.argv[1]); print('begins', flush=True)\n"
        "with lock(path, '', wait=True): print(path.exists(), flush=True); sys.stdin.read()"
    )
    path = tmp_path / ".lock"
    with lock(path, ""):
        waiting = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert waiting.stdout is not None and waiting.stdout.readline() == "begins\n"
        path.unlink()
    assert waiting.stdout.readline() == "True\n"
    with pytest.raises(BlockingIOError):
        lock(path, "")
    waiting.send_signal(signal.SIGKILL)
    waiting.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("wait", [False, True])
def test_without_locks_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, wait: bool
) -> None:
    without_locks(monkeypatch, number)
    for name in (".one", ".two"):
        with lock(tmp_path / name, "nothing keeps two runs apart", wait) as got:
            assert not got.held
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"{tmp_path} is on a file system without locks ({os.strerror(number)}): nothing keeps two runs apart"
    )


def test_without_locks_one_rank_of_a_machine_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_locks(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert not lock(tmp_path / ".lock", "nothing").held
    assert not caplog.records
