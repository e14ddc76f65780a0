"""What could not be encoded and why: failures are written down and counted, never papered over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

LEDGER = "failures.jsonl"
"""Name of the ledger in a folder of feature stores."""


@dataclass(frozen=True)
class Failure:
    """One media item that gave no features.

    id      its key
    path    its file
    stage   what was being done: "decode" or "encode"
    reason  one sentence
    """

    id: str
    path: str
    stage: str
    reason: str


class BudgetExceeded(ValueError):
    """More media failed than the user allowed."""


class Ledger:
    """An append-only JSONL file of failures, and the share of media that may fail before a run stops.

    Processes that share the file share the budget: each counts what the others appended since it opened the ledger.
    For that a run writes its failures down although an earlier run wrote the same.

    path    such as STORE/failures.jsonl; made with the first failure
    total   media in the run, of all its processes
    budget  share of `total` that may fail; 0.01 is one in a hundred
    """

    def __init__(self, path: Path, total: int, budget: float = 0.01) -> None:
        if not 0 <= budget <= 1:
            raise ValueError(f"the failure budget must be a share between 0 and 1, not {budget}")
        self.path, self.total, self.budget = path, total, budget
        self._opened_at = path.stat().st_size if path.exists() else 0
        self._failed: set[str] = set()

    @property
    def count(self) -> int:
        """Media that failed in this process."""
        return len(self._failed)

    def add(self, failure: Failure) -> None:
        """Write a failure to disk, once; raises BudgetExceeded when it is one too many."""
        if failure.id not in self._failed:
            line = json.dumps(asdict(failure), ensure_ascii=False) + "\n"
            # One write to a file opened for appending: lines of several processes do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, _line_break(self.path) + line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._failed.add(failure.id)
        failed = len({f.id for f in read_failures(self.path, self._opened_at)})
        if failed > self.budget * self.total:
            raise BudgetExceeded(
                f"{failed} of {self.total} media failed, more than the failure budget of {self.budget:.2%}; the last: "
                f"{failure.reason}; all are in {self.path}"
            )


def read_failures(path: Path, offset: int = 0) -> Iterator[Failure]:
    """Failures in a ledger from a byte on, in order; nothing where there is none. A line torn by a kill is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    for line in text.splitlines():
        try:
            yield Failure(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue


def _line_break(path: Path) -> bytes:
    """A line break where the last line lacks one, torn by a kill, so that the next does not become part of it."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"
