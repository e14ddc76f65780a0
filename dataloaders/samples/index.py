"""Tokenize annotations once, in many processes, and cache the result on disk.

The name of the cache file is a checksum of everything that the numbers depend on: the annotation files, the tokenizer,
the options and the code of the readers. Changed data are read again; ranks and later runs use the file of the first
one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from glob import escape
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataloaders import formats, records
from dataloaders.cpu import available_cores
from dataloaders.files import remove_abandoned, sha256
from dataloaders.formats import Format, Reading, parse_json
from dataloaders.formats.stream import iter_raw
from dataloaders.locks import lock
from dataloaders.records import RecordError
from dataloaders.samples import prompts, tokenized
from dataloaders.samples.prompts import tokenize
from dataloaders.samples.tokenized import Columns, TokenizedFile

_CHUNK = 256
"""Records per task of a process."""

_WORTH_PROCESSES = 32_000_000
"""Bytes of annotations above which starting more processes saves time."""

_MAX_PROCESSES = 32

_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Malformed:
    """A record that could not be read: `line` of `file`, from 1, and a reason without the place."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class _Task:
    """Some records of an annotation file; spans are (offset, length) in bytes."""

    path: Path
    kind: Format
    spans: Sequence[tuple[int, int]]


_Result = tuple[Columns | None, list[tuple[int, str]]]


class TokenizeRecords:
    """Reads and tokenizes the records of a task. Sent to each process once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> None:
        self.tokenizer, self.reading = tokenizer, reading

    def __call__(self, task: _Task) -> _Result:
        """Columns of the good records, and (offset, reason) of the malformed ones."""
        samples, texts, digests, errors = [], [], [], []
        with task.path.open("rb") as file:
            for offset, length in task.spans:
                file.seek(offset)
                raw = file.read(length)
                # Lines are counted later, and only if a message needs them.
                place = f"@{offset}"
                try:
                    record = parse_json(raw, place)
                    sample = task.kind.sample(record, place, task.path.parent, self.reading)
                except RecordError as error:
                    errors.append((offset, str(error).removeprefix(f"{place}: ")))
                    continue
                n, p = self.reading.num_frames, self.reading.num_points
                samples.append(tokenize(sample, self.tokenizer, num_frames=n, num_points=p))
                texts += [sample.id.encode(), sample.media.encode()]
                # Of the record's bytes: an edited answer or trajectory may keep all lengths.
                digests.append(hashlib.sha256(raw).digest()[:16])
        return (tokenized.pack(samples, texts, digests) if samples else None), errors


def open_index(
    folder: Path,
    formats: Sequence[Format],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    cache: Path | None,
    processes: int | None = None,
) -> tuple[TokenizedFile, list[Malformed]]:
    """All samples of a split's annotation files, in order, and its malformed records.

    folder     of the split, such as DATA/stage2
    cache      folder for the tokenized samples; None for no cache
    processes  worker processes; 0 for none, None chooses by the size of the files
    Raises ValueError for an annotation file that is truncated or not JSON, and if `cache` is not writable.
    """
    with tempfile.TemporaryDirectory() if cache is None else nullcontext(cache) as directory:
        path = Path(directory) / f"{folder.name}-{_identity(folder, formats, tokenizer, reading)}.safetensors"
        # A cache that holds the file is not written to: it may be read-only.
        if not path.exists():
            with _writable(path.parent), _locked(path) as held:
                if not path.exists():
                    remove_abandoned(path.parent, f".{escape(path.name)}.*.tmp", held)
                    _build(path, folder, formats, TokenizeRecords(tokenizer, reading), processes)
        index = TokenizedFile(path)
    return index, [Malformed(*entry) for entry in json.loads(index.notes["malformed"])]


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    """Create the cache folder. Within the block, raises ValueError if the folder is not writable."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise ValueError(
            f"tokenized samples cannot be kept in {cache} ({error.strerror}); choose another folder with --cache"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of the process that builds the file, while others wait.

    Yields False on a file system without locks: there each process builds the same file, and the last one remains.
    """
    file = path.with_name(f".{path.name}.lock")
    with lock(file, "runs that start together each tokenize the same samples", wait=True) as held:
        try:
            yield held.held
        finally:
            file.unlink(missing_ok=True)


def _identity(folder: Path, formats: Sequence[Format], tokenizer: PreTrainedTokenizerBase, reading: Reading) -> str:
    """16 hexadecimal digits: a checksum of everything that the numbers of the index depend on."""
    inputs = [
        folder.name,
        {kind.file: sha256(folder / kind.file) for kind in formats},
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        repr(reading),
        _code(),
    ]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


@lru_cache(1)
def _code() -> str:
    """A checksum of the code that turns records into numbers, so that no version has to be increased by hand."""
    files = [file for module in (formats, records, prompts, tokenized) for file in _sources(module)]
    return hashlib.sha256("".join(sha256(file) for file in [*files, Path(__file__)]).encode()).hexdigest()


def _sources(module: ModuleType) -> list[Path]:
    """The source files of a module or package."""
    assert module.__file__ is not None
    file = Path(module.__file__)
    return sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]


def _build(path: Path, folder: Path, formats: Sequence[Format], work: TokenizeRecords, processes: int | None) -> None:
    broken: list[str] = []
    tasks = [task for kind in formats for task in _tasks(folder / kind.file, kind, broken)]
    errors: dict[str, list[tuple[int, str]]] = {kind.file: [] for kind in formats}
    notes: dict[str, str] = {}

    def parts() -> Iterator[Columns]:
        with (
            _run(work, tasks, _processes(tasks, processes)) as results,
            tqdm(
                desc=f"reading {folder.name}", unit=" records", total=sum(len(t.spans) for t in tasks), delay=5
            ) as bar,
        ):
            for task, (columns, found) in zip(tasks, results):
                errors[task.path.name] += found
                bar.update(len(task.spans))
                if columns is not None:
                    yield columns
        malformed = [
            (file, line, reason)
            for file, found in errors.items()
            for line, (_, reason) in zip(_lines(folder / file, [offset for offset, _ in found]), found)
        ]
        if broken:
            errors_shown = [f"{folder / file}:{line}: {reason}" for file, line, reason in malformed[:10]]
            raise RecordError("\n".join([*errors_shown, *broken]))
        notes["malformed"] = json.dumps(malformed)

    tokenized.write(path, parts(), work.reading.num_frames, work.reading.num_points, notes)


def _tasks(path: Path, kind: Format, broken: list[str]) -> Iterator[_Task]:
    """Tasks for the records of an annotation file; if it cannot be read to its end, the reason goes to `broken`."""
    spans: list[tuple[int, int]] = []
    try:
        for offset, text in iter_raw(path):
            spans.append((offset, len(text)))
            if len(spans) == _CHUNK:
                yield _Task(path, kind, spans)
                spans = []
    except RecordError as error:
        broken.append(str(error))
    if spans:
        yield _Task(path, kind, spans)


def _lines(path: Path, offsets: Sequence[int]) -> Iterator[int]:
    """The line numbers, from 1, of ascending offsets, in one pass over the file."""
    line, position = 1, 0
    with path.open("rb") as file:
        for offset in offsets:
            while position < offset:
                block = file.read(min(offset - position, 1 << 20))
                line += block.count(b"\n")
                position += len(block)
            yield line


def _processes(tasks: Sequence[_Task], processes: int | None) -> int:
    if processes is not None:
        return processes
    size = sum(length for task in tasks for _, length in task.spans)
    return min(available_cores(), _MAX_PROCESSES) if size >= _WORTH_PROCESSES else 0


@contextmanager
def _run(work: TokenizeRecords, tasks: Sequence[_Task], processes: int) -> Iterator[Iterable[_Result]]:
    """The results of the tasks, in order."""
    if processes < 2:
        yield map(work, tasks)
        return
    # A forked child of a process with threads may hang. Sending a tokenizer takes a second, so it is sent once.
    with ProcessPoolExecutor(processes, get_context("spawn"), _set_work, (work,)) as pool:
        yield pool.map(_do_work, tasks)


_work: TokenizeRecords | None = None


def _set_work(work: TokenizeRecords) -> None:
    global _work
    _work = work


def _do_work(task: _Task) -> _Result:
    assert _work is not None
    return _work(task)
