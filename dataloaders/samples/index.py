"""Tokenize annotations once, in many processes, and cache the result on disk.

The name of the cache file is a checksum of everything that the numbers depend on: the annotation files, the tokenizer,
the options and the code of the readers. Changed data are read again; ranks and later runs use the file of the first
one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dataloaders import formats, records
from dataloaders.derived import Malformed, NotWritableError, Records, Result, Task, checksum_of_code, make_once
from dataloaders.files import sha256
from dataloaders.formats import Format, Reading, parse_json
from dataloaders.records import RecordError
from dataloaders.samples import prompts, tokenized
from dataloaders.samples.prompts import tokenize
from dataloaders.samples.tokenized import Columns, TokenizedFile


class TokenizeRecords:
    """Reads and tokenizes the records of a task. Sent to each process once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> None:
        self.tokenizer, self.reading = tokenizer, reading

    def __call__(self, task: Task) -> Result[Columns]:
        """Columns of the good records, and (offset, reason) of the malformed ones."""
        samples, texts, digests, errors = [], [], [], []
        for offset, raw in task.records():
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

    def make(path: Path) -> None:
        _build(path, Records(folder, formats, TokenizeRecords(tokenizer, reading), processes), reading)

    with tempfile.TemporaryDirectory() if cache is None else nullcontext(cache) as directory:
        path = Path(directory) / f"{folder.name}-{_identity(folder, formats, tokenizer, reading)}.safetensors"
        try:
            make_once(path, "tokenized samples", make)
        except NotWritableError as error:
            raise ValueError(f"{error}; choose another folder with --cache") from error
        index = TokenizedFile(path)
    return index, [Malformed(*entry) for entry in json.loads(index.notes["malformed"])]


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
    """A checksum of the code that turns records into numbers."""
    return checksum_of_code(formats, records, prompts, tokenized, sys.modules[__name__])


def _build(path: Path, samples: Records[Columns], reading: Reading) -> None:
    notes: dict[str, str] = {}

    def parts() -> Iterator[Columns]:
        yield from samples
        notes["malformed"] = json.dumps([astuple(m) for m in samples.malformed])

    tokenized.write(path, parts(), reading.num_frames, reading.num_points, notes)
