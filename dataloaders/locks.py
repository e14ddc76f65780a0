"""Locks between processes with flock. The kernel releases a lock when its process ends, for whatever reason.

Some file systems do not support locks: Lustre mounted without `-o flock`, NFS without lockd. There a process continues
without a lock after one warning, because a lock file of its own making would remain after a kill.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import IO

from dataloaders.ranks import Ranks

_LOG = logging.getLogger(__name__)
_warned: set[Path] = set()


class Lock:
    """A lock file that this process holds until `close` or the end of the `with` block.

    held  False on a file system without locks
    """

    def __init__(self, file: IO[str], held: bool) -> None:
        self._file, self.held = file, held

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(path: Path, consequence: str, wait: bool = False) -> Lock:
    """Acquire the lock file at `path`, which is created.

    consequence  what may happen on a file system without locks: the end of the warning
    wait         wait until another process releases the lock
    Raises BlockingIOError if another process holds it and `wait` is False; OSError if the file cannot be created.
    """
    while True:
        # In append mode, since locks over NFS need a file that is open for writing.
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError as error:
            _warn(path, error, consequence)
            return Lock(file, held=False)
        except BaseException:
            file.close()
            raise
        if _is_at(file, path):
            return Lock(file, held=True)
        file.close()  # its last holder removed the file, and another process may hold a new one


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _warn(path: Path, error: OSError, consequence: str) -> None:
    """Print a warning, once for each folder, on one rank of each machine."""
    folder = path.parent.absolute()
    if folder not in _warned and Ranks.read().local == 0:
        _LOG.warning("%s is on a file system without locks (%s): %s", folder, error.strerror, consequence)
    _warned.add(folder)
