"""Files derived from annotations: made once, in many processes, and kept on disk for other ranks and runs.

The tokenized samples (`samples.index`) and the lists of media (`media`) are such files. A file's name contains a
checksum of everything that its contents depend on, so changed data give another file.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from glob import escape
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from dataloaders.cpu import available_cores
from dataloaders.files import remove_abandoned, sha256
from dataloaders.formats import Format
from dataloaders.formats.stream import iter_raw
from dataloaders.locks import lock
from dataloaders.records import RecordError

_CHUNK = 256
"""Records per task of a process."""

_AHEAD = 4
"""Tasks per process that are cut from the files in advance, which bounds the memory."""

_WORTH_PROCESSES = 32_000_000
"""Bytes of annotations above which starting more processes saves time."""

_MAX_PROCESSES = 32
_ERRORS_SHOWN = 10
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")
log = logging.getLogger(__name__)


class NotWritableError(ValueError):
    """The folder of a derived file is read-only or full."""


def make_once(path: Path, what: str, make: Callable[[Path], None]) -> None:
    """Have the file at `path` made by one process, while others that need it wait. Does nothing if it exists.

    what  name of the contents in messages, such as "tokenized samples"
    make  writes the file atomically
    On a file system without locks each process makes the same file, and the last one remains. A folder that holds the
    file is not written to: it may be read-only. Raises NotWritableError for a folder that cannot be written to.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, what) as held:
            if not path.exists():
                remove_abandoned(path.parent, f".{escape(path.name)}.*.tmp", held)
                make(path)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise NotWritableError(f"{what} cannot be kept in {path.parent} ({error.strerror})") from error


@contextmanager
def _locked(path: Path, what: str) -> Iterator[bool]:
    """Hold the lock of the process that makes the file. Yields False on a file system without locks."""
    file = path.with_name(f".{path.name}.lock")
    consequence = f"processes that start together each make the same {what}"
    try:
        held = lock(file, consequence)
    except BlockingIOError:
        log.info("waiting for the %s that another process makes: %s", what, path.name)
        held = lock(file, consequence, wait=True)
    with held:
        try:
            yield held.held
        finally:
            file.unlink(missing_ok=True)


def checksum_of_code(*modules: ModuleType) -> str:
    """A checksum of modules and whole packages, and of this one, so that no version has to be increased by hand."""
    files = [file for module in modules for file in _sources(module)]
    return hashlib.sha256("".join(sha256(file) for file in [*files, Path(__file__)]).encode()).hexdigest()


def _sources(module: ModuleType) -> list[Path]:
    """The source files of a module or package."""
    assert module.__file__ is not None
    file = Path(module.__file__)
    return sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]


@dataclass(frozen=True)
class Malformed:
    """A record that could not be read: `line` of `file`, from 1, and a reason without the place."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Task:
    """Some records of an annotation file; spans are (offset, length) in bytes, and `first` is the number of the first
    record, from 0."""

    path: Path
    kind: Format
    spans: Sequence[tuple[int, int]]
    first: int = 0

    def records(self) -> Iterator[tuple[int, bytes]]:
        """(offset, text) of each record."""
        with self.path.open("rb") as file:
            for offset, length in self.spans:
                file.seek(offset)
                yield offset, file.read(length)


Result = tuple[T | None, list[tuple[int, str]]]
"""What a task gives: a value, None without a good record; and (offset, reason) of the malformed records."""


class Records(Generic[T]):
    """Reads all records of the annotation files in a folder, with a progress bar; iterate once, for the tasks' values.

    work       what is done with a task; sent to each process once
    processes  worker processes; 0 for none, None chooses by the size of the files
    malformed  the malformed records, in the order of the files, after the last value
    Raises RecordError at the end for a file that is truncated or not JSON, after the first ten malformed records.
    """

    def __init__(
        self, folder: Path, formats: Sequence[Format], work: Callable[[Task], Result[T]], processes: int | None = None
    ) -> None:
        self._folder, self._formats, self._work = folder, formats, work
        self._size = sum((folder / kind.file).stat().st_size for kind in formats)
        chosen = min(available_cores(), _MAX_PROCESSES) if self._size >= _WORTH_PROCESSES else 0
        self._processes = chosen if processes is None else processes
        self.malformed: list[Malformed] = []

    def __iter__(self) -> Iterator[T]:
        broken: list[str] = []
        errors: dict[str, list[tuple[int, str]]] = {kind.file: [] for kind in self._formats}
        offsets: dict[str, list[int]] = {kind.file: [] for kind in self._formats}  # of all records
        tasks = (task for kind in self._formats for task in _tasks(self._folder / kind.file, kind, broken))
        files = self._folder.name + (f"/{self._formats[0].file}" if len(self._formats) == 1 else "")
        records = 0
        with (
            closing(_run(self._work, tasks, self._processes)) as results,
            tqdm(desc=f"reading {files}", total=self._size, unit="B", unit_scale=True, delay=2) as bar,
        ):
            for task, (value, found) in results:
                errors[task.path.name] += found
                offsets[task.path.name] += [offset for offset, _ in task.spans]
                records += len(task.spans)
                bar.set_postfix_str(f"{records:,} records", refresh=False)
                bar.update(sum(length for _, length in task.spans))
                if value is not None:
                    yield value
        self.malformed = [
            Malformed(file, line, _with_number(reason, line, bisect_left(offsets[file], offset) + 1))
            for file, found in errors.items()
            for line, (offset, reason) in zip(line_numbers(self._folder / file, [at for at, _ in found]), found)
        ]
        if broken:
            shown = [f"{self._folder / m.file}:{m.line}: {m.reason}" for m in self.malformed[:_ERRORS_SHOWN]]
            raise RecordError("\n".join([*shown, *broken]))


def _with_number(reason: str, line: int, number: int) -> str:
    """A reason with the number of the record, from 1, where a JSON array has several records on a line."""
    return f"record {number}: {reason}" if number > line else reason


def _tasks(path: Path, kind: Format, broken: list[str]) -> Iterator[Task]:
    """Tasks for the records of an annotation file; if it cannot be read to its end, the reason goes to `broken`."""
    spans: list[tuple[int, int]] = []
    first = 0
    try:
        for offset, text in iter_raw(path):
            spans.append((offset, len(text)))
            if len(spans) == _CHUNK:
                yield Task(path, kind, spans, first)
                spans, first = [], first + len(spans)
    except RecordError as error:
        broken.append(str(error))
    if spans:
        yield Task(path, kind, spans, first)


def line_numbers(path: Path, offsets: Iterable[int]) -> Iterator[int]:
    """The line numbers, from 1, of ascending offsets, in one pass over the file."""
    line, position = 1, 0
    with path.open("rb") as file:
        for offset in offsets:
            while position < offset:
                block = file.read(min(offset - position, 1 << 20))
                line += block.count(b"\n")
                position += len(block)
            yield line


def _run(
    work: Callable[[Task], Result[T]], tasks: Iterable[Task], processes: int
) -> Generator[tuple[Task, Result[T]], None, None]:
    """The tasks and their results, in order."""
    if processes < 2:
        yield from ((task, work(task)) for task in tasks)
        return
    # A forked child of a process with threads may hang. Sending a tokenizer takes a second, so it is sent once.
    with ProcessPoolExecutor(processes, get_context("spawn"), _set_work, (work,)) as pool:
        pending: deque[tuple[Task, Future[Result[T]]]] = deque()
        for task in tasks:
            pending.append((task, pool.submit(_do_work, task)))
            if len(pending) > _AHEAD * processes:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


_work: Callable[[Task], Any] | None = None


def _set_work(work: Callable[[Task], Any]) -> None:
    global _work
    _work = work


def _do_work(task: Task) -> Any:
    assert _work is not None
    return _work(task)
