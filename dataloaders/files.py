"""Files that are either whole or not there: written beside, flushed to disk, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; a kill at any moment leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def directory_written_atomically(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that becomes `path` when the block ends without an exception.

    An existing `path` is replaced. After an exception, such as a full disk, nothing of the attempt remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        put_in_place(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_in_place(beside: Path, path: Path) -> None:
    """Flush the finished directory `beside` to disk and make it `path`; an existing `path` is replaced."""
    for file in beside.iterdir():
        sync(file)
    sync(beside)
    if path.exists():
        old = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        beside.rename(path)
        shutil.rmtree(old)
    else:
        beside.rename(path)
    sync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError, as every other write does, when the disk is full."""
    # Decoding processes import this module by way of the store, and need no torch.
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error).removeprefix("Error while serializing: "), str(path)) from error


def sha256(path: Path) -> str:
    """Checksum of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_file(path: Path) -> None:
    """Raise ValueError unless `path` is a regular file with content of its own.

    A git-lfs pointer, the small text that a clone without git-lfs leaves in a large file's place, is refused.
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
