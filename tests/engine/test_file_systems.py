"""engine.train on real file systems: moved and linked folders, no locks, read-only stores, umasks."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from engine.train import main
from pite import lineage
from pite.checkpoint import from_pretrained, save_pretrained
from tests.engine.workspace import train_arguments


def test_a_whole_run_can_be_moved(workspace: Path, tmp_path: Path, monkeypatch):
    """The lineage holds relative paths to the earlier stages."""
    monkeypatch.chdir(workspace)
    shutil.copytree(workspace / "llm", tmp_path / "here" / "llm")
    for stage in ("1", "2"):
        assert main(train_arguments(workspace, tmp_path / "here" / "out", stage, llm=tmp_path / "here" / "llm")) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir("/")
    assert from_pretrained(tmp_path / "there" / "out" / "stage2" / "final").config.num_points == 3


def test_a_run_behind_symbolic_links(workspace: Path, tmp_path: Path, capsys):
    """An output folder behind a link, a stage that is a link, a link to a stage's output: each path loads."""
    disk, home = tmp_path / "disks" / "7" / "scratch", tmp_path / "home"
    for folder in (disk / "elsewhere", home):
        folder.mkdir(parents=True)
    (home / "runs").symlink_to(disk)
    output = home / "runs" / "pite"
    output.mkdir()
    (output / "stage2").symlink_to(disk / "elsewhere")
    (home / "llm").symlink_to(workspace / "llm")
    arguments = train_arguments(workspace, output, llm=home / "llm")
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("is done") == 3
    (tmp_path / "newest").symlink_to(output / "stage3" / "final")
    for stage in (1, 2, 3):
        for path in (output / f"stage{stage}" / "final", (output / f"stage{stage}" / "final").resolve()):
            assert lineage.stages(path) == tuple(range(1, stage + 1))
            from_pretrained(path)
    assert lineage.stages(tmp_path / "newest") == (1, 2, 3)
    from_pretrained(tmp_path / "newest")


def test_a_run_is_moved_out_of_symbolic_links(workspace: Path, tmp_path: Path):
    """The links may be gone: stages refer to each other by their real paths."""
    (tmp_path / "a" / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "disk")
    shutil.copytree(workspace / "llm", tmp_path / "a" / "disk" / "llm")
    for stage in ("1", "2"):
        arguments = train_arguments(workspace, tmp_path / "link" / "out", stage, llm=tmp_path / "link" / "llm")
        assert main(arguments) == 0
    (tmp_path / "link").unlink()
    (tmp_path / "a" / "disk").rename(tmp_path / "moved")
    assert lineage.stages(tmp_path / "moved" / "out" / "stage2" / "final") == (1, 2)
    from_pretrained(tmp_path / "moved" / "out" / "stage2" / "final")


def test_without_file_locks_it_trains_after_a_warning(workspace: Path, tmp_path: Path, monkeypatch, caplog):
    """NFS without lockd, Lustre without `-o flock`."""
    shutil.copytree(workspace / "features", tmp_path / "features", ignore=shutil.ignore_patterns("samples"))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("dataloaders.locks.fcntl.flock", refuse)
    monkeypatch.setattr("dataloaders.locks._warned", set())
    output = tmp_path / "out"
    assert main(train_arguments(workspace, output, "1", max_steps=1, store=tmp_path / "features")) == 0
    warnings = [record.getMessage() for record in caplog.records if "without locks" in record.getMessage()]
    assert len(warnings) == 2
    assert warnings[0].startswith(f"{output} is on a file system without locks (No locks available): make sure that no")
    assert warnings[1].startswith(f"{tmp_path / 'features' / 'samples'} is on a file system without locks")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_store_takes_a_cache_elsewhere(workspace: Path, tmp_path: Path, capsys, monkeypatch, number: int):
    """Shared features often belong to another user. Permissions do not apply to root, so the refusal is simulated."""
    store = tmp_path / "features"
    shutil.copytree(workspace / "features", store, ignore=shutil.ignore_patterns("samples"))
    forbid_writing_below(store, number, monkeypatch)
    flags = {"store": store, "max_steps": 1}
    assert main(train_arguments(workspace, tmp_path / "out", "1", **flags)) == 1
    assert capsys.readouterr().err.endswith(
        f"\nengine.train: stage 1: tokenized samples cannot be kept in {store / 'samples'} ({os.strerror(number)}); "
        "choose another folder with --cache\n"
    )
    assert main(train_arguments(workspace, tmp_path / "out", "1", **flags, cache=tmp_path / "cache" / "new")) == 0
    assert [path.suffix for path in (tmp_path / "cache" / "new").iterdir()] == [".safetensors"]


def test_samples_in_a_read_only_store_are_read_there(workspace: Path, tmp_path: Path, monkeypatch):
    """The owner of the store may have made them. Then nothing is written next to them, not even a lock."""
    store = tmp_path / "features"
    shutil.copytree(workspace / "features", store, ignore=shutil.ignore_patterns("samples"))
    assert main(train_arguments(workspace, tmp_path / "owner", "1", store=store, max_steps=1)) == 0
    forbid_writing_below(store, errno.EROFS, monkeypatch)
    assert main(train_arguments(workspace, tmp_path / "reader", "1", store=store, max_steps=1)) == 0


def forbid_writing_below(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every call that would write to a folder fail, as on a read-only disk."""
    real_open, real_mkdir = os.open, os.mkdir

    def check(path: object) -> None:
        if isinstance(path, str | Path) and Path(path).is_relative_to(folder):
            raise OSError(number, os.strerror(number), str(path))

    def audited_open(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            check(path)
        return real_open(path, flags, *rest, **options)

    def audited_path_open(self, mode="r", *rest, **options):
        if set(mode) & set("wax+"):
            check(self)
        return real_path_open(self, mode, *rest, **options)

    def audited_mkdir(path, *rest, **options):
        check(path)
        return real_mkdir(path, *rest, **options)

    real_path_open = Path.open
    monkeypatch.setattr(os, "open", audited_open)
    monkeypatch.setattr(os, "mkdir", audited_mkdir)
    monkeypatch.setattr(Path, "open", audited_path_open)


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_a_stage_has_the_permissions_of_the_umask(workspace: Path, tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        assert main(train_arguments(workspace, tmp_path / "out", "1", cache=tmp_path / "cache")) == 0
        save_pretrained(from_pretrained(tmp_path / "out" / "stage1" / "final"), tmp_path / "whole")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
