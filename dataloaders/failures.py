"""The log of media that failed to decode or encode, and the failure budget.

    FEATURES/failures.HOST-PID-RANDOM.jsonl    failures of one process, created with the first failure
    FEATURES/failures.jsonl                    failures logged by earlier versions, read as well

Each process appends to its own file, because a network file system may mix or lose lines that several append to one.

`python -m dataloaders.store failures FEATURES` prints the failures of a folder of feature stores, by reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path

from dataloaders.files import process_name

LEDGER = "failures.jsonl"
"""Name of the ledger in a folder of feature stores. The file of a process has the process name in the middle."""


@dataclass(frozen=True)
class Failure:
    """One media item that gave no features.

    id      its key
    path    its file
    stage   "find" for a file that does not exist or is empty, "check" for one of another duration than its annotation,
            "decode", "encode", or "import" of features made by another program
    reason  one sentence
    """

    id: str
    path: str
    stage: str
    reason: str


class BudgetExceeded(ValueError):
    """More media failed than the failure budget allows."""


def over_budget(failed: int, total: int, budget: float) -> str:
    """The part of a message that gives the budget and a remedy, for `failed` of `total` that exceed it."""
    share = failed / total
    if share > 0.5:
        return f"more than the failure budget of {budget:.2%}, and more than half: check the files and their format"
    digits = max(2, 1 - math.floor(math.log10(share)))
    enough = math.ceil(share * 10**digits) / 10**digits
    if failed > enough * total:
        enough += 10**-digits
    flag = f"{min(enough, 1.0):.{digits}f}".rstrip("0").rstrip(".")
    return f"more than the failure budget of {budget:.2%}; add --failure-budget {flag} or more to leave them out"


def reason_kind(reason: str, path: str, key: str = "") -> str:
    """A reason without its file and numbers, to count failures that differ only in these as one."""
    # The reason may name the file in another folder, since two splits can link to one.
    reason = reason.rpartition(f"{Path(path).name}: ")[2]
    return re.sub(r"\d+(\.\d+)?", "#", reason.replace(key, "...") if key else reason)


class Ledger:
    """An append-only log of failures, JSON lines, and the share of media that may fail before a run stops.

    Processes that share the ledger share the budget: each also counts the lines that the others append from now on.
    Therefore a run logs its failures even if an earlier run logged the same.

    path    such as STORE/failures.jsonl; this process's file is made next to it, with its first failure
    total   media in the run, of all its processes
    budget  share of `total` that may fail; 0.01 is one in a hundred
    """

    def __init__(self, path: Path, total: int, budget: float = 0.01) -> None:
        if not 0 <= budget <= 1:
            raise ValueError(f"the failure budget must be a share between 0 and 1, not {budget}")
        self.path, self.total, self.budget = path, total, budget
        self._own = path.with_name(f"{path.stem}.{process_name()}{path.suffix}")
        self._read_to = {file: file.stat().st_size for file in _files(path)}
        self._failed: set[str] = set()
        self._failed_elsewhere: set[str] = set()

    @property
    def files(self) -> str:
        """A pattern of all files of the ledger, for messages."""
        return str(self.path.with_name(f"{self.path.stem}*{self.path.suffix}"))

    @property
    def count(self) -> int:
        """Media that failed in this process."""
        return len(self._failed)

    def log(self, failures: Iterable[Failure]) -> None:
        """Write failures to disk, each id once, without a look at the budget."""
        new = {failure.id: failure for failure in failures if failure.id not in self._failed}
        if new:
            self._append([{**asdict(failure), "time": time.time()} for failure in new.values()])
            self._failed.update(new)

    def count_elsewhere(self, ids: Iterable[str]) -> None:
        """Count failures that another process logs, also if it does so before this ledger was opened."""
        self._failed_elsewhere.update(ids)

    def add(self, failure: Failure) -> None:
        """Write a failure to disk, once. Raises BudgetExceeded if it is one too many."""
        self.log([failure])
        for file in _files(self.path):
            if file != self._own:
                entries, self._read_to[file] = _read(file, self._read_to.get(file, 0))
                self._failed_elsewhere.update(other.id for _, other in entries)
        failed = len(self._failed | self._failed_elsewhere)
        if failed > self.budget * self.total:
            raise BudgetExceeded(
                f"{failed:,} of {self.total:,} media failed, {over_budget(failed, self.total, self.budget)}; the last: "
                f"{failure.reason}; all are in {self.files}"
            )

    def _append(self, entries: Iterable[dict[str, object]]) -> None:
        with self._own.open("ab") as file:
            file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())
            file.flush()
            os.fsync(file.fileno())


def read_failures(path: Path) -> Iterator[Failure]:
    """Failures in the ledgers of all processes, in order of time; nothing without a ledger.

    A line torn by a kill is skipped. Failures logged by earlier versions have no time and come first.
    """
    entries = [entry for file in _files(path) for entry in _read(file, 0)[0]]
    yield from (failure for _, failure in sorted(entries, key=lambda entry: entry[0]))


def _files(path: Path) -> list[Path]:
    """The files of a ledger that exist."""
    own = sorted(path.parent.glob(f"{escape(path.stem)}.*{escape(path.suffix)}"))
    return [path, *own] if path.exists() else own


def _read(file: Path, offset: int) -> tuple[list[tuple[float, Failure]], int]:
    """Times and failures in a file from byte `offset` on, and the end of the last complete line."""
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            content = opened.read()
    except FileNotFoundError:
        return [], offset
    entries = []
    for line in content.split(b"\n"):
        try:
            values = json.loads(line)
            entries.append((float(values.pop("time", 0.0)), Failure(**values)))
        except (ValueError, TypeError, AttributeError):
            continue
    return entries, offset + content.rfind(b"\n") + 1


def report(failures: Iterable[Failure], encoded: Collection[str] = ()) -> str:
    """A table of failures by reason, the most frequent first, each with an example.

    Each id counts once, with its last reason, and not at all if it is in `encoded`. Reasons that differ only in file
    and numbers are counted as one.
    """
    last = {failure.id: failure for failure in failures}
    open_cases = [failure for failure in last.values() if failure.id not in encoded]
    groups: dict[tuple[str, str], list[Failure]] = defaultdict(list)
    for failure in open_cases:
        groups[failure.stage, reason_kind(failure.reason, failure.path, failure.id)].append(failure)
    lines = [f"{len(open_cases):,} media failed, {len(last) - len(open_cases):,} more were encoded since"]
    for (stage, reason), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"{len(members):8,}  {stage}  {reason}  (such as {members[0].id}: {members[0].path})")
    return "\n".join(lines)
