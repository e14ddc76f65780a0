"""Atomic writes: temporary names, files left by killed processes, the umask, many writers of one path."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataloaders import files
from dataloaders.files import (
    abandoned,
    directory_written_atomically,
    remove_abandoned,
    temporary_sibling,
    write_atomically,
    write_tensors,
)


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_written_files_have_the_umasks_permissions(tmp_path: Path, umask: int) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    write_atomically(tmp_path / "b.json", "{}")
    with directory_written_atomically(tmp_path / "folder") as directory:
        write_tensors(directory / "c.safetensors", {"c": torch.ones(2)})
    for path in tmp_path.rglob("*"):
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert len(list(tmp_path.rglob("*"))) == 4, "no file that probed the umask remains"


def test_temporary_names_are_hidden_and_differ(tmp_path: Path) -> None:
    path = tmp_path / "a.b.safetensors"
    names = {temporary_sibling(path).name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".a.b.safetensors.") and name.endswith(".tmp") for name in names)
    assert all(f"-{os.getpid()}-" in name for name in names)


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 200 + ".json"])
def test_any_name_that_can_be_written_can_be_written_atomically(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, "content")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_processes_with_the_same_id_write_the_same_path(tmp_path: Path) -> None:
    """As in containers, where process ids start at 1."""
    code = (
        "import os, sys, pathlib; os.getpid = lambda: 1; from dataloaders import files\n"
        "for i in range(100):\n"
        "    files.write_atomically(pathlib.Path(sys.argv[1]), sys.argv[2] * 5000)"
    )
    path = tmp_path / "manifest.json"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "abc"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert path.read_text() in {letter * 5000 for letter in "abc"}
    assert list(tmp_path.iterdir()) == [path]


def test_many_write_the_same_directory(tmp_path: Path) -> None:
    path = tmp_path / "final"

    def write(i: int) -> None:
        with directory_written_atomically(path) as directory:
            for name in ("one", "two"):
                (directory / name).write_text(str(i))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(60)))
    assert (path / "one").read_text() == (path / "two").read_text()
    assert list(tmp_path.iterdir()) == [path]


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def named_as_of(path: Path, pid: int, monkeypatch: pytest.MonkeyPatch, machine: str | None = None) -> Path:
    """Write a temporary file with the name that another process would use."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid)
        if machine is not None:
            patch.setattr(files, "_machine", lambda: machine)
        temporary = temporary_sibling(path)
    temporary.write_text("half")
    return temporary


def test_only_files_without_a_writer_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, dead = tmp_path / "data", ended_process()
    own, gone = (named_as_of(path, pid, monkeypatch) for pid in (os.getpid(), dead))
    elsewhere, long_ago = (named_as_of(path, dead, monkeypatch, "node7-0123abcd") for _ in range(2))
    day_before = time.time() - files.ABANDONED_AFTER - 60
    os.utime(long_ago, (day_before, day_before))
    unnamed = tmp_path / ".data.123.tmp"
    unnamed.touch()
    assert [abandoned(p) for p in (own, gone, elsewhere, long_ago, unnamed)] == [False, True, False, True, False]
    assert abandoned(unnamed, locked=True) and not abandoned(elsewhere, locked=True)
    remove_abandoned(tmp_path, ".data.*.tmp")
    assert set(tmp_path.iterdir()) == {own, elsewhere, unnamed}
    remove_abandoned(tmp_path, ".data.*.tmp", locked=True)
    assert set(tmp_path.iterdir()) == {own, elsewhere}


def test_the_last_change_of_a_folder_is_that_of_its_newest_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a file does not change the date of its folder."""
    folder = named_as_of(tmp_path / "data", 1, monkeypatch, "node7-0123abcd")
    folder.unlink()
    folder.mkdir()
    (folder / "columns").write_text("still growing")
    day_before = time.time() - files.ABANDONED_AFTER - 60
    os.utime(folder, (day_before, day_before))
    assert not abandoned(folder)
    os.utime(folder / "columns", (day_before, day_before))
    assert abandoned(folder)


@pytest.mark.parametrize("alone", [False, True])
def test_the_next_attempt_removes_files_of_killed_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """In a folder that a run has claimed (`alone`), it removes the files of any process."""
    path = tmp_path / "final"
    gone = named_as_of(path, ended_process(), monkeypatch)
    elsewhere = named_as_of(path, 1, monkeypatch, "node7-0123abcd")
    with directory_written_atomically(path, alone=alone) as directory:
        write_tensors(directory / "a.safetensors", {"a": torch.ones(2)})
    assert not gone.exists() and elsewhere.exists() != alone
    assert load_file(path / "a.safetensors")["a"].tolist() == [1, 1]


def test_a_file_system_that_cannot_flush_folders_or_change_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network and FUSE file systems are."""
    flush = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    monkeypatch.setattr(Path, "chmod", refuse)
    write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)})
    with directory_written_atomically(tmp_path / "folder") as folder:
        (folder / "a").write_text("whole")
    assert (tmp_path / "folder" / "a").read_text() == "whole"
    assert load_file(tmp_path / "t.safetensors")["a"].sum() == 2


def test_removing_a_link_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.remove(tmp_path / "link")
    assert (tmp_path / "target").is_dir() and not (tmp_path / "link").is_symlink()
