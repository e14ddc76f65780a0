"""A stage's training set: every sample's place on disk and its sizes in memory, the samples themselves read on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataloaders.formats import (
    Format,
    Record,
    Room,
    Where,
    iter_raw,
    load_json,
    parse_json,
    present_formats,
    read_pite,
)
from dataloaders.prompts import tokenize
from dataloaders.records import RecordError, Sample, TokenizedSample

_ERRORS_SHOWN = 10
"""Malformed records that are looked for before the reading ends: a pass over a stage takes minutes."""


@dataclass(frozen=True)
class _Source:
    """One annotation file and how its records are read."""

    folder: Path
    kind: Format
    options: dict[str, int]

    @property
    def path(self) -> Path:
        return self.folder / self.kind.file

    def sample(self, record: Record, offset: int) -> Sample:
        return cast(Sample, self.kind.read(record, Where(self.path, offset), self.folder, **self.options))

    def samples(self, errors: list[str]) -> Iterator[tuple[int, bytes, Sample]]:
        """Yield (offset, text, sample) of each record; sentences about malformed ones go to `errors`.

        Ends with the file or the last error that is shown; after the first error nothing is yielded.
        """
        try:
            for offset, text in iter_raw(self.path):
                try:
                    sample = self.sample(parse_json(text, Where(self.path, offset)), offset)
                except RecordError as error:
                    errors.append(str(error))
                    if len(errors) >= _ERRORS_SHOWN:
                        return
                    continue
                if not errors:
                    yield offset, text, sample
        except RecordError as error:
            errors.append(str(error))


class StageDataset:
    """Samples of one stage in the order of their files, indexed by one streaming pass.

    data, stage   folder in the layout of `dataloaders.formats`; 1, 2 or 3
    num_frames, num_points  N and P of the trajectories (1 and 1 in stage 1)
    max_length    tokens; longer samples are left out and counted in `over_length`, never cut
    available     keys of encoded media; samples about others are left out, their keys in `not_encoded`. None for all

    tokens, targets, coordinates  (n,) int32 per sample: length, supervised tokens, present coordinates
    Raises ValueError for a folder without data, or for malformed records: one sentence for each of the first ten, with
    file, line and field.
    """

    def __init__(
        self,
        data: Path,
        stage: Literal[1, 2, 3],
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_frames: int,
        num_points: int,
        max_length: int,
        available: Container[str] | None,
    ) -> None:
        self.num_frames, self.num_points, self.max_length = num_frames, num_points, max_length
        self._tokenizer = tokenizer
        room = cast(Room, f"stage{stage}")
        shape = {"num_frames": num_frames, "num_points": num_points}
        self._sources = [
            _Source(data / room, kind, shape if kind.read is read_pite else {}) for kind in present_formats(data, room)
        ]
        self.ids: list[str] = []
        self.media: list[str] = []
        self.over_length: list[str] = []
        self.not_encoded: list[str] = []
        places: list[tuple[int, int, int]] = []
        sizes: list[tuple[int, int, int]] = []
        errors: list[str] = []
        # Of the records as written: an edited answer or trajectory may leave every length as it was.
        contents = hashlib.sha256()
        for number, source in enumerate(self._sources):
            if len(errors) >= _ERRORS_SHOWN:
                break
            for offset, text, sample in source.samples(errors):
                if available is not None and sample.media not in available:
                    self.not_encoded.append(sample.media)
                    continue
                tokenized = self._tokenize(sample)
                if len(tokenized.token_ids) > max_length:
                    self.over_length.append(sample.id)
                    continue
                self.ids.append(sample.id)
                self.media.append(sample.media)
                contents.update(text)
                places.append((number, offset, len(text)))
                sizes.append((len(tokenized.token_ids), len(tokenized.target_positions), tokenized.num_coordinates))
        if errors:
            raise RecordError("\n".join(errors))
        if not places:
            raise ValueError(f"{data / room} holds no usable sample: {self.summary()}")
        self._places = np.array(places, dtype=np.int64)
        self.tokens, self.targets, self.coordinates = np.array(sizes, dtype=np.int32).T.copy()
        for counts in (self.tokens, self.targets, self.coordinates):
            contents.update(counts.tobytes())
        self._checksum = contents.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> TokenizedSample:
        number, offset, nbytes = self._places[index].tolist()
        source = self._sources[number]
        record = load_json(source.path, offset, nbytes)
        return self._tokenize(source.sample(record, offset))

    def groups(self) -> np.ndarray:
        """A number (n,) per sample that samples about the same media share."""
        return np.unique(np.array(self.media), return_inverse=True)[1]

    def summary(self) -> str:
        parts = [f"{len(self.ids):,} samples"]
        if self.over_length:
            parts.append(f"{len(self.over_length):,} left out for more than {self.max_length:,} tokens")
        if self.not_encoded:
            parts.append(f"{len(self.not_encoded):,} left out whose media could not be encoded")
        return ", ".join(parts)

    def fingerprint(self) -> str:
        """A short checksum of the samples, their annotations and lengths in tokens; equal data give equal training."""
        return f"{len(self):,} samples {self._checksum[:16]}"

    def _tokenize(self, sample: Sample) -> TokenizedSample:
        return tokenize(sample, self._tokenizer, num_frames=self.num_frames, num_points=self.num_points)
