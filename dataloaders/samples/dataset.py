"""A stage's training set: tokenized once, mapped from disk, with a log of every sample that is left out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Container, Sequence
from copy import copy
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataloaders.failures import Failure
from dataloaders.files import write_if_changed
from dataloaders.formats import NarrativeTiming, Reading, Stage, TurnChoice, check_budget, present_formats, split_of
from dataloaders.records import TokenizedSample
from dataloaders.samples.forest import SHORTEST
from dataloaders.samples.index import open_index, video_of
from dataloaders.samples.layouts import VICUNA, layout_of
from dataloaders.samples.marked import Marks, first_row
from dataloaders.samples.plan import Prefixes
from dataloaders.transcripts import Transcripts


class StageDataset:
    """Samples of one stage in the order of their files.

    data, stage   folder in the layout of `dataloaders.formats`; 1, 2 or 3
    num_frames, num_points  N and P of the trajectories (1 and 1 in stage 1)
    max_length    tokens; longer samples are left out and listed in `over_length`, never truncated
    available     keys of encoded media; samples of other media are left out, their keys in `not_encoded`. None for all
    cache         folder that keeps the tokenized samples for other ranks and runs; None for no cache
    failure_budget  share of the stage's records that may be malformed; they are left out and listed in `malformed`
    turn, narrative_timing  see `dataloaders.formats.Reading`
    processes     worker processes that read annotations; None chooses by the size of the files
    formats       annotation files to read, of those in the stage's folder; None for all
    marks         for samples whose video stands between two marks; None for PiTe's
    transcripts   folder of transcripts of the videos' sound, which samples with marks quote; None: none is quoted

    repeats                       records with the text of an earlier one, which are samples too
    tokens, targets, coordinates  (n,) int32 per sample: length, supervised tokens, present coordinates
    mentions                      (n,) int32 per sample: mentions with different trajectories
    largest_tokens                (n,) int32 per sample: the largest token id
    Raises ValueError for a folder without data, for transcripts of none of the videos, and if more records are malformed than
    the budget allows: one sentence for each of the first ten, with file, line and field.
    """

    def __init__(
        self,
        data: Path,
        stage: Stage,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_frames: int,
        num_points: int,
        max_length: int,
        available: Container[str] | None,
        cache: Path | None = None,
        failure_budget: float = 0.01,
        turn: TurnChoice = "first",
        narrative_timing: NarrativeTiming = "words",
        processes: int | None = None,
        formats: Sequence[str] | None = None,
        marks: Marks | None = None,
        transcripts: Path | None = None,
    ) -> None:
        self.num_frames, self.num_points, self.max_length = num_frames, num_points, max_length
        self._stage, self._folder = stage, data / split_of(stage)
        self._marks, self._first_row = marks, first_row(tokenizer) if marks else 0
        self._layout = VICUNA if marks else layout_of(tokenizer)
        chosen = present_formats(data, split_of(stage), formats)
        reading = Reading(num_frames, num_points, turn, narrative_timing)
        self._transcripts = None if transcripts is None else Transcripts(transcripts)
        index = open_index(self._folder, chosen, tokenizer, reading, cache, processes, marks, self._transcripts)
        self._index, self.malformed, self.repeats = index.samples, index.malformed, index.repeats
        good = np.ones(len(self._index), dtype=bool)
        good[index.clashing] = False
        errors = [f"{self._folder / m.file}:{m.line}: {m.reason}" for m in self.malformed]
        check_budget(errors, len(errors) + int(good.sum()), failure_budget)

        ids, media = self._index.ids, self._index.media
        fits = self._index.tokens <= max_length
        encoded = np.array([available is None or key in available for key in media], dtype=bool)
        self.over_length = [ids[row] for row in np.flatnonzero(good & encoded & ~fits)]
        self.not_encoded = [media[row] for row in np.flatnonzero(good & ~encoded)]
        self._select(np.flatnonzero(good & fits & encoded))
        if not self.ids:
            remedy = ": run engine.encode first" if self.not_encoded else ""
            files = ", ".join(kind.file for kind in chosen)
            raise ValueError(f"{self._folder} holds no usable sample: {self.summary()}, in {files}{remedy}")
        if self._transcripts is not None:
            self._transcripts.check(map(video_of, self.media))

    def _select(self, rows: np.ndarray) -> None:
        """Set the samples to rows of the index."""
        self._rows = rows
        self.__dict__.pop("groups", None)  # of other samples, where this is a copy
        self.ids = [self._index.ids[row] for row in rows]
        self.media = [self._index.media[row] for row in rows]
        self.tokens, self.targets = self._index.tokens[rows], self._index.targets[rows]
        self.coordinates, self.mentions = self._index.coordinates[rows], self._index.mentions[rows]
        self.largest_tokens = self._index.largest_tokens[rows]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> TokenizedSample:
        return self._index[int(self._rows[index])]

    def split(self, held_out: float | Path) -> tuple[StageDataset, StageDataset]:
        """Two views of the samples: to train on, and to validate on.

        held_out  a share, chosen by a checksum of the media's key, so that all samples of a video are in one of the two;
                  or a file of ids or media keys, one a line
        Raises ValueError if one of the two would be empty, OSError if the file cannot be read.
        """
        if isinstance(held_out, Path):
            chosen = self.named_in(held_out)
        else:
            chosen = np.array([_fraction(key) < held_out for key in self.media], dtype=bool)
        if chosen.all() or not chosen.any():
            which, change = ("all", "fewer") if chosen.all() else ("none", "more, such as --held-out 0.1")
            raise ValueError(
                f"--held-out {held_out} holds out {which} of the {len(self):,} samples of {self._folder}: hold out {change}"
            )
        views = copy(self), copy(self)
        for view, rows in zip(views, (self._rows[~chosen], self._rows[chosen])):
            view._select(rows)
        return views

    def named_in(self, file: Path) -> np.ndarray:
        """Whether each sample's id or media key is a line of the file: (n,) bool."""
        wanted = read_names(file)
        return np.array([name in wanted or key in wanted for name, key in zip(self.ids, self.media)], dtype=bool)

    @cached_property
    def groups(self) -> np.ndarray:
        """Group numbers (n,) int64: samples of the same media have the same number."""
        numbers = {key: number for number, key in enumerate(sorted(set(self.media)))}
        return np.fromiter((numbers[key] for key in self.media), np.int64, len(self.media))

    def prefixes(self, chosen: np.ndarray) -> Prefixes:
        """What the chosen samples (B,) share: the prompt's head, and the rows of the same media."""
        if self._marks is None:
            # One prompt layout and one tokenizer: the head is the same for all.
            head = int(self._index.frame_starts[0])
            return Prefixes(head, head + self._index.num_features, self.groups[chosen])
        first = self._index.frame_starts[self._rows[chosen]] == self._first_row
        head = self._first_row
        if not first.all():
            # The head ends before the mark; a short one is not shared then (`dataloaders.samples.forest`).
            head = head - 1 if head > SHORTEST else 0
        # A video after its question is no other sample's.
        own = len(self) + np.arange(len(chosen))
        media = self._first_row + self._marks.num_features
        return Prefixes(head, media, np.where(first, self.groups[chosen], own))

    def summary(self) -> str:
        parts = [f"{len(self.ids):,} samples"]
        if self._stage < 3 and self.ids:
            parts.append(f"{int((self.mentions > 0).sum()):,} with mentions")
            parts.append(f"{int((self.coordinates > 0).sum()):,} with a trajectory")
        if self._transcripts is not None and self.ids:
            quoted = sum(self._transcripts.text(video_of(key)) is not None for key in self.media)
            parts.append(f"{quoted:,} with a transcript")
        if self.over_length:
            parts.append(f"{len(self.over_length):,} left out for more than {self.max_length:,} tokens")
        if self.not_encoded:
            parts.append(f"{len(self.not_encoded):,} left out whose media are not in the feature store")
        if self.malformed:
            parts.append(f"{len(self.malformed):,} malformed records left out")
        if self.repeats:
            first = self.repeats[0]
            parts.append(
                f"{len(self.repeats):,} records that repeat an earlier one, the first at {first.file}:{first.line}"
            )
        return ", ".join(parts)

    def left_out(self) -> list[Failure]:
        """All samples left out, with reasons, in the order of the files for each reason; the same on every rank."""
        length = f"the sample has more than {self.max_length} tokens"
        return [
            *(
                Failure(f"{self._folder.name}/{m.file}:{m.line}", str(self._folder / m.file), "read", m.reason)
                for m in self.malformed
            ),
            *(
                Failure(f"{self._folder.name}/{name}", str(self._folder), "tokenize", length)
                for name in self.over_length
            ),
            *(
                Failure(key, str(self._folder), "encode", "its media is not in the feature store")
                for key in self.not_encoded
            ),
        ]

    def exclusions(self) -> dict[str, int | str]:
        """For checkpoints: the number of samples left out for each reason, and a checksum of which ones."""
        failures = self.left_out()
        counts = Counter(failure.stage for failure in failures)
        which = hashlib.sha256(json.dumps([[f.id, f.stage, f.reason] for f in failures]).encode()).hexdigest()[:16]
        return {**dict(sorted(counts.items())), "which": which} if failures else {}

    def write_left_out(self, path: Path) -> None:
        """Write `left_out` as JSON lines, in the format of the encoder's ledger, unless the file holds them already."""
        lines = (json.dumps(asdict(f), ensure_ascii=False) + "\n" for f in self.left_out())
        write_if_changed(path, "".join(lines))

    def fingerprint(self) -> str:
        """A short checksum of the samples: their annotations, their lengths in tokens, and a chat template's text."""
        contents = hashlib.sha256(self._index.digests[self._rows].tobytes())
        if self._layout != VICUNA:
            contents.update(repr(self._layout).encode())
        if self._marks is not None:
            contents.update(repr(self._marks).encode())
        for counts in (self.tokens, self.targets, self.coordinates):
            contents.update(counts.tobytes())
        return f"{len(self):,} samples {contents.hexdigest()[:16]}"


def read_names(file: Path) -> set[str]:
    """The lines of a file that are not empty."""
    return set(file.read_text(encoding="utf-8").splitlines()) - {""}


def _fraction(key: str) -> float:
    """A number in [0, 1) from a checksum of the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
