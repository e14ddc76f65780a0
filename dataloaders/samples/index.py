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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dataloaders import formats, records
from dataloaders.derived import (
    Malformed,
    NotWritableError,
    Records,
    Result,
    Task,
    checksum_of_code,
    line_numbers,
    make_once,
)
from dataloaders.files import sha256_once
from dataloaders.formats import Format, Reading, parse_json
from dataloaders.records import Media, RecordError, Sample, TokenizedSample, clash
from dataloaders.samples import layouts, marked, prompts, tokenized
from dataloaders.samples.marked import Marks
from dataloaders.samples.prompts import tokenize
from dataloaders.samples.tokenized import Columns, TokenizedFile
from dataloaders.transcripts import Transcripts


@dataclass(frozen=True)
class Part:
    """The good records of a task: their columns and file, and of each its place, checksum of its text, and media."""

    columns: Columns
    file: str
    offsets: list[int]
    texts: list[bytes]
    media: list[Media]


class TokenizeRecords:
    """Reads and tokenizes the records of a task. Sent to each process once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reading: Reading,
        marks: Marks | None,
        transcripts: Transcripts | None = None,
    ) -> None:
        self.tokenizer, self.reading, self.marks, self.transcripts = tokenizer, reading, marks, transcripts

    def __call__(self, task: Task) -> Result[Part]:
        """The good records, and (offset, reason) of the malformed ones."""
        samples, names, digests, offsets, texts, media, errors = [], [], [], [], [], [], []
        for number, (offset, raw) in enumerate(task.records(), task.first):
            # Lines are counted later, and only if a message needs them.
            place = f"@{offset}"
            try:
                record = parse_json(raw, place)
                sample = task.kind.sample(record, place, task.path.parent, self.reading)
                media.append(task.kind.media(record, place, task.path.parent))
            except RecordError as error:
                errors.append((offset, str(error).removeprefix(f"{place}: ")))
                continue
            if self.transcripts is not None:
                sample = replace(sample, transcript=self.transcripts.text(video_of(sample.media)))
            samples.append(self._tokenize(sample, number))
            offsets.append(offset)
            names += [sample.id.encode(), sample.media.encode()]
            # The last line of a file may lack its end.
            text = raw.rstrip()
            digest = hashlib.sha256(text)
            texts.append(digest.digest()[:16])
            # Of all bytes of the record and its transcript: an edited answer or trajectory may keep all lengths.
            digest.update(raw[len(text) :])
            if sample.transcript is not None:
                digest.update(f"\0{sample.transcript}".encode())
            digests.append(digest.digest()[:16])
        if not samples:
            return None, errors
        return Part(tokenized.pack(samples, names, digests), task.path.name, offsets, texts, media), errors

    def _tokenize(self, sample: Sample, number: int) -> TokenizedSample:
        if self.marks is not None:
            return marked.tokenize(replace(sample, video_first=self.marks.is_first(number)), self.tokenizer, self.marks)
        n, p = self.reading.num_frames, self.reading.num_points
        return tokenize(sample, self.tokenizer, num_frames=n, num_points=p)


@dataclass(frozen=True)
class Index:
    """All good records of a split's annotation files, tokenized, in order.

    malformed  the records that are not among them
    clashing   rows of samples whose media are not those that their key has in an earlier record; they are in `malformed`
               too, and must not be used, since the features under this key are of other frames
    repeats    records whose text is that of an earlier one. Several records may be about one video, but each has another
               text
    """

    samples: TokenizedFile
    malformed: list[Malformed]
    clashing: list[int]
    repeats: list[Malformed]


def open_index(
    folder: Path,
    formats: Sequence[Format],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    cache: Path | None,
    processes: int | None = None,
    marks: Marks | None = None,
    transcripts: Transcripts | None = None,
) -> Index:
    """The index of a split.

    folder     of the split, such as DATA/stage2
    cache      folder for the tokenized samples; None for no cache
    processes  worker processes; 0 for none, None chooses by the size of the files
    marks      for samples whose video stands between two marks; None for PiTe's
    transcripts  of the videos' sound, which the samples with marks quote
    Raises ValueError for an annotation file that is truncated or not JSON, for a damaged transcript, and if `cache` is not
    writable.
    """

    def make(path: Path) -> None:
        work = TokenizeRecords(tokenizer, reading, marks, transcripts)
        features = reading.num_frames if marks is None else marks.num_features
        _build(path, folder, Records(folder, formats, work, processes), reading, features)

    with tempfile.TemporaryDirectory() if cache is None else nullcontext(cache) as directory:
        identity = _identity(folder, formats, tokenizer, reading, marks, transcripts)
        path = Path(directory) / f"{folder.name}-{identity}.safetensors"
        try:
            make_once(path, "tokenized samples", make)
        except NotWritableError as error:
            raise ValueError(f"{error}; choose another folder with --cache") from error
        samples = TokenizedFile(path)
    malformed, repeats = (
        [Malformed(*entry) for entry in json.loads(samples.notes[name])] for name in ("malformed", "repeats")
    )
    return Index(samples, malformed, json.loads(samples.notes["clashing"]), repeats)


def _identity(
    folder: Path,
    formats: Sequence[Format],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    marks: Marks | None,
    transcripts: Transcripts | None,
) -> str:
    """16 hexadecimal digits: a checksum of everything that the numbers of the index depend on."""
    inputs = [
        folder.name,
        {kind.file: sha256_once(folder / kind.file) for kind in formats},
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        repr(layouts.layout_of(tokenizer)),
        repr(reading),
        repr(marks),
        None if transcripts is None else transcripts.checksum(),
        _code(),
    ]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def video_of(key: str) -> str:
    """The name of a video's file without its suffix, of the key of its features."""
    return key.partition("/")[2]


@lru_cache(1)
def _code() -> str:
    """A checksum of the code that turns records into numbers."""
    return checksum_of_code(formats, records, layouts, marked, prompts, tokenized, sys.modules[__name__])


def _build(path: Path, folder: Path, parts: Records[Part], reading: Reading, num_features: int) -> None:
    notes: dict[str, str] = {}
    known: dict[str, tuple[float, float] | None] = {}  # key -> clip; a key contains the name of the file
    texts: set[bytes] = set()
    clashing: list[int] = []
    clashes: dict[str, list[tuple[int, str]]] = {}
    repeats: dict[str, list[tuple[int, str]]] = {}

    def columns() -> Iterator[Columns]:
        row = 0
        for part in parts:
            for offset, text, media in zip(part.offsets, part.texts, part.media):
                clip = known.setdefault(media.key, media.clip)
                if clip != media.clip:
                    clashing.append(row)
                    clashes.setdefault(part.file, []).append((offset, clash(replace(media, clip=clip), media)))
                elif text in texts:
                    repeats.setdefault(part.file, []).append((offset, "repeats an earlier record"))
                texts.add(text)
                row += 1
            yield part.columns
        found = [*parts.malformed, *_at_lines(folder, clashes)]
        notes["malformed"] = json.dumps([astuple(m) for m in found])
        notes["repeats"] = json.dumps([astuple(m) for m in _at_lines(folder, repeats)])
        notes["clashing"] = json.dumps(clashing)

    tokenized.write(path, columns(), num_features, (reading.num_points, reading.num_frames), notes)


def _at_lines(folder: Path, found: Mapping[str, Sequence[tuple[int, str]]]) -> list[Malformed]:
    """File -> (offset, reason) of records in order, with lines in place of offsets."""
    return [
        Malformed(file, line, reason)
        for file, entries in found.items()
        for line, (_, reason) in zip(line_numbers(folder / file, [offset for offset, _ in entries]), entries)
    ]
