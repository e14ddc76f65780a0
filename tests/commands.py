"""Runs a command's `main` in this process, on a full disk if need be."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def status_of(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit status, whether `main` returns it or a wrong flag ends the process."""
    try:
        return main(argv)
    except SystemExit as end:
        return int(end.code or 0)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes: like a full disk, writes fail, and their error names no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
