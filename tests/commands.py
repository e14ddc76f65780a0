"""Runs a command's `main` in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def status_of(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit status, whether `main` returns it or a wrong flag ends the process."""
    try:
        return main(argv)
    except SystemExit as end:
        return int(end.code or 0)
