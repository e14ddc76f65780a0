"""Atomic writes: files are written under a temporary name, flushed to disk and renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

ABANDONED_AFTER = 24 * 3600.0
"""Seconds without a change after which a temporary file of another machine counts as left by a killed process."""

_MAX_NAME = 255
"""Most bytes of a file name."""

_WRITER = re.compile(r"\.([\w-]+-[0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
"""End of a temporary name: the machine, the process id, a random number."""


def temporary_sibling(path: Path) -> Path:
    """A hidden name in `path`'s folder, different at each call: `.NAME.HOST-PID-RANDOM.tmp`.

    The random part distinguishes processes with the same id, as in two containers.
    """
    end = f".{process_name()}.tmp"
    start = os.fsencode(f".{path.name}")[: _MAX_NAME - len(end)].decode(errors="ignore")
    return path.with_name(start + end)


def process_name() -> str:
    """HOST-PID-RANDOM of this process, for a file of its own; different at each call."""
    return f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def abandoned(path: Path, locked: bool = False) -> bool:
    """Whether no running process writes the temporary file or folder `path` any more.

    This is certain if its process ran on this machine and has ended. For other machines it is assumed after a day.

    locked  the caller holds the lock of all writers of such files, so a file without a process in its name has no
            writer
    """
    found = _WRITER.search(path.name)
    if found is None and locked:
        return True
    if found is not None and found[1] == _machine() and not _alive(int(found[2])):
        return True
    return time.time() - _last_change(path) > ABANDONED_AFTER


def remove_abandoned(folder: Path, pattern: str, locked: bool = False) -> None:
    """Remove the `abandoned` temporary files and folders in `folder` that match a glob pattern."""
    for path in folder.glob(pattern):
        if abandoned(path, locked):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@lru_cache(1)
def _machine() -> str:
    """The host name, and 8 digits that differ between boots and between containers with their own process ids."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not Linux: the host name must suffice
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    name = re.sub(r"[^\w-]", "-", parts[0], flags=re.ASCII)[:32]
    return f"{name}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _last_change(path: Path) -> float:
    """Time of the last write to a file, or to a folder or any file in it; the current time if it is gone."""
    try:
        inside = list(path.iterdir()) if path.is_dir() else []
        return max(p.stat().st_mtime for p in (path, *inside))
    except FileNotFoundError:
        return time.time()


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to disk; some file systems cannot flush a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def file_written_atomically(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write a file at, which becomes `path` when the block ends without an exception.

    A kill at any moment leaves the old file or the new one; an exception leaves the old one and nothing else. An OSError
    of the block that names no file, or the temporary one, names `path` instead.

    flush  flush to disk as well, so that the file survives a power failure
    """
    temporary = temporary_sibling(path)
    try:
        yield temporary
        if flush:
            sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        # A full disk is found in a write, whose error has no path.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    if flush:
        sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; a kill at any moment leaves the old file or the new one."""
    with file_written_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_if_changed(path: Path, content: str) -> None:
    """`write_atomically`, unless the file has this content already."""
    if not path.is_file() or path.read_bytes() != content.encode():
        write_atomically(path, content)


@contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory next to `path`, under a temporary name; removed at the end if it still exists."""
    temporary = temporary_sibling(path)
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def directory_written_atomically(path: Path, alone: bool = False) -> Iterator[Path]:
    """Yield an empty directory next to `path` that becomes `path` when the block ends without an exception.

    An existing `path` is replaced. After an exception, such as a full disk, nothing of the attempt remains.

    alone  no other process writes `path`, so leftovers of all earlier attempts are removed; otherwise the `abandoned`
           ones
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{escape(path.name)}.*tmp"):
        if alone or abandoned(leftover):
            remove(leftover)
    with temporary_directory(path) as temporary:
        yield temporary
        put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Flush the finished directory `temporary` to disk and make it `path`; an existing `path` is replaced."""
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    replaced = []
    while not _renamed(temporary, path):
        old = temporary_sibling(path)
        with suppress(FileNotFoundError):  # another process may be replacing it too
            path.rename(old)
            replaced.append(old)
    for old in replaced:
        remove(old)
    sync(path.parent)


def _renamed(directory: Path, path: Path) -> bool:
    """Rename a directory; False where `path` exists."""
    try:
        directory.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False
    return True


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError, as every other write does, when the disk is full."""
    # Decoding processes import this module through the store and do not need torch.
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error).removeprefix("Error while serializing: "), str(path)) from error
    give_default_mode(path)


def give_default_mode(path: Path) -> None:
    """Set the permissions that the umask allows, for a file that a library created readable by its owner only."""
    # The umask can only be read by setting it, which affects all threads.
    probe = temporary_sibling(path)
    try:
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        with suppress(PermissionError, NotImplementedError):  # FAT and CIFS give every file one mode
            if path.stat().st_mode & 0o777 != mode:
                path.chmod(mode)
    finally:
        probe.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Checksum of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_known: dict[tuple[str, int, int], str] = {}
"""(path, size, time of the last change) -> checksum, of this process and of those that gave theirs."""


def sha256_once(path: Path) -> str:
    """`sha256`, read once in a process while size and time of the last change are the same."""
    status = path.stat()
    key = str(path), status.st_size, status.st_mtime_ns
    if key not in _known:
        _known[key] = sha256(path)
    return _known[key]


def folder_checksum(folder: Path) -> str:
    """Checksum of the names and contents of a folder's files without the hidden ones, as 12 hexadecimal digits."""
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    sums = json.dumps([(name.as_posix(), sha256_once(folder / name)) for name in shown])
    return hashlib.sha256(sums.encode()).hexdigest()[:12]


def known_checksums() -> dict[tuple[str, int, int], str]:
    """What `sha256_once` has read, for `remember_checksums` in another process of this host."""
    return dict(_known)


def remember_checksums(known: Mapping[tuple[str, int, int], str]) -> None:
    _known.update(known)


def require_file(path: Path) -> None:
    """Raise ValueError unless `path` is a regular file with content of its own.

    A git-lfs pointer is refused: the small text that a clone without git-lfs has instead of a large file.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path} is {'no regular file' if path.exists() else 'missing'}")
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            if not start:
                raise ValueError(f"{path} is empty: fetch it again")
            if start == _LFS_POINTER:
                raise ValueError(f"{path} is a git-lfs pointer, not the file itself: run git lfs pull in its folder")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def check_model_name(path_or_name: str) -> None:
    """Raise ValueError unless it is a folder or has the form of a name on Hugging Face's hub, `owner/name`."""
    if Path(path_or_name).expanduser().is_dir():
        return
    if path_or_name.count("/") != 1 or path_or_name.startswith((".", "/", "~")):
        raise ValueError(f"{path_or_name} is neither a directory nor a Hugging Face model name (owner/name)")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, for anything else."""
    require_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} where an object is expected")
    return value
