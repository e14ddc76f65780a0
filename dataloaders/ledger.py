"""What could not be encoded and why: failures are written down and counted, never papered over.

python -m dataloaders.ledger FEATURES    the failures of a folder of feature stores, by reason
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LEDGER = "failures.jsonl"
"""Name of the ledger in a folder of feature stores."""


@dataclass(frozen=True)
class Failure:
    """One media item that gave no features.

    id      its key
    path    its file
    stage   what was being done: "decode" or "encode", or "import" of features that others made
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
        self._read_to = path.stat().st_size if path.exists() else 0
        self._failed: set[str] = set()
        self._failed_anywhere: set[str] = set()

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
        failures, self._read_to = _read(self.path, self._read_to)
        self._failed_anywhere.update(f.id for f in failures)
        failed = len(self._failed_anywhere)
        if failed > self.budget * self.total:
            raise BudgetExceeded(
                f"{failed} of {self.total} media failed, more than the failure budget of {self.budget:.2%}; the last: "
                f"{failure.reason}; all are in {self.path}"
            )


def read_failures(path: Path) -> Iterator[Failure]:
    """Failures in a ledger, in order; nothing where there is none. A line torn by a kill is left out."""
    yield from _read(path, 0)[0]


def _read(path: Path, offset: int) -> tuple[list[Failure], int]:
    """Failures in the lines from a byte on, and where the last whole line ends."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    failures = []
    for line in content.splitlines():
        try:
            failures.append(Failure(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return failures, offset + content.rfind(b"\n") + 1


def report(failures: Iterable[Failure], encoded: Collection[str] = ()) -> str:
    """A table of failures by reason, the most frequent first, each with an example.

    Each id counts once, with its last reason, and not at all where it is among the `encoded` by now. Reasons that differ
    only in their file and numbers are one.
    """
    last = {failure.id: failure for failure in failures}
    open_cases = [failure for failure in last.values() if failure.id not in encoded]
    groups: dict[tuple[str, str], list[Failure]] = defaultdict(list)
    for failure in open_cases:
        # The same file may stand under another folder there: two rooms can link to one.
        reason = failure.reason.rpartition(f"{Path(failure.path).name}: ")[2].replace(failure.id, "...")
        groups[failure.stage, re.sub(r"\d+(\.\d+)?", "#", reason)].append(failure)
    lines = [f"{len(open_cases):,} media failed, {len(last) - len(open_cases):,} more were encoded since"]
    for (stage, reason), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"{len(members):8,}  {stage}  {reason}  (such as {members[0].id}: {members[0].path})")
    return "\n".join(lines)


def _line_break(path: Path) -> bytes:
    """A line break where the last line lacks one, torn by a kill, so that the next does not become part of it."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: print the report of a folder that engine.encode filled."""
    # Nothing else here knows stores, and decoding processes need none.
    from dataloaders.store import MANIFEST, FeatureStore

    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m dataloaders.ledger FEATURES", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    if not folder.is_dir():
        print(f"dataloaders.ledger: {folder}: no such folder of features", file=sys.stderr)
        return 1
    stores = [FeatureStore(manifest.parent) for manifest in sorted(folder.glob(f"*/{MANIFEST}"))]
    print(report(read_failures(folder / LEDGER), {key for store in stores for key in store.keys}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
