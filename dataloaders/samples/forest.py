"""Common prefixes of a micro-batch's samples, as a forest of segments.

Under a causal mask the hidden states of a prefix do not depend on what follows, so a prefix that several samples share
is computed once. Its gradient is the sum over the samples. A segment is a run of rows; a sample is the path from a root
to one segment. Samples are split where they first differ, up to the end of the frames: the head of the prompt becomes a
root, and a video with several questions a segment below it. Further down, shared words would cost more in short segments
than they save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataloaders.records import TokenizedSample

SHORTEST = 8
"""Rows of the shortest part of a head that is shared. A shorter beginning of unequal heads is computed for each sample."""


@dataclass(frozen=True)
class Forest:
    """G segments of T rows, and the path of each of S samples.

    lengths  (G,) rows of each segment; a segment's rows follow those of the one before
    paths    for each segment the segments from its root to itself
    samples  for each sample the last segment of its path
    """

    lengths: np.ndarray
    paths: list[tuple[int, ...]]
    samples: list[int]

    @property
    def shared(self) -> bool:
        """Whether a segment has a parent: then its keys are not its own rows alone."""
        return any(len(path) > 1 for path in self.paths)

    def rows(self, segments: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The rows of each segment's whole path, one after the other, and the boundaries between these documents."""
        starts = np.cumsum(self.lengths) - self.lengths
        pieces = np.array([piece for g in segments for piece in self.paths[g]], dtype=np.int64)
        totals = [int(self.lengths[list(self.paths[g])].sum()) for g in segments]
        return _ranges(starts[pieces], self.lengths[pieces]), np.concatenate([[0], np.cumsum(totals, dtype=np.int64)])


def separate(lengths: np.ndarray) -> Forest:
    """A segment for each sample: nothing is shared."""
    return Forest(lengths, [(g,) for g in range(len(lengths))], list(range(len(lengths))))


def find_prefixes(samples: Sequence[TokenizedSample], features: Sequence[np.ndarray]) -> Forest:
    """The forest of samples whose token ids, positions and features are equal from the start on.

    A sample's last token has no row: it predicts nothing, and no later row attends to it.
    """
    keys = [sample.token_ids[:-1].copy() for sample in samples]
    for key, sample, number in zip(keys, samples, _records(samples, features)):
        # A frame is equal to the same frame of an equal record, and to no token.
        frames = slice(sample.frame_start, sample.frame_start + sample.num_features)
        key[frames] = -1 - number - len(samples) * np.arange(sample.num_features)
    starts = [sample.frame_start for sample in samples]
    tree = _Tree(keys, starts, [sample.frame_start + sample.num_features for sample in samples])
    tree.grow(list(range(len(samples))), 0, ())
    return Forest(np.array(tree.lengths, dtype=np.int64), tree.paths, tree.last)


class _Tree:
    """Segments in the order of their rows, parents first."""

    def __init__(self, keys: list[np.ndarray], frame_starts: list[int], frame_ends: list[int]) -> None:
        self._keys, self._frame_starts, self._frame_ends = keys, frame_starts, frame_ends
        self.lengths: list[int] = []
        self.paths: list[tuple[int, ...]] = []
        self.last = [0] * len(keys)

    def grow(self, members: list[int], begin: int, path: tuple[int, ...]) -> None:
        """Add the segments of samples that are equal up to position `begin`, which the path leads to."""
        end = begin + self._common(members, begin)
        # A head, or frames, or one sample to its end; or a long beginning of unequal heads.
        if end >= min(self._frame_starts[m] for m in members) or end - begin >= SHORTEST:
            path = (*path, len(self.paths))
            self.paths.append(path)
            self.lengths.append(end - begin)
            begin = end
        parts: dict[tuple[int, int], list[int]] = {}
        for m in members:
            if len(self._keys[m]) == begin:
                self.last[m] = path[-1]
            else:
                alone = len(self._keys[m]) == end or self._frame_ends[m] <= end
                parts.setdefault((m, -1) if alone else (-1, int(self._keys[m][end])), []).append(m)
        for part in parts.values():
            self.grow(part, begin, path)

    def _common(self, members: list[int], begin: int) -> int:
        """The number of equal keys from `begin` on."""
        shortest = min(len(self._keys[m]) for m in members)
        if len(members) == 1:
            return shortest - begin
        equal = np.ones(shortest - begin, dtype=bool)
        first = self._keys[members[0]][begin:shortest]
        for m in members[1:]:
            equal &= self._keys[m][begin:shortest] == first
        return int(equal.argmin()) if not equal.all() else shortest - begin


def _records(samples: Sequence[TokenizedSample], features: Sequence[np.ndarray]) -> list[int]:
    """The number of each sample's feature record; equal records of one media have one number."""
    seen: dict[str, list[int]] = {}
    numbers = []
    for i, (sample, record) in enumerate(zip(samples, features)):
        of_media = seen.setdefault(sample.media, [])
        equal = (j for j in of_media if features[j] is record or np.array_equal(features[j], record))
        number = next(equal, i)
        if number == i:
            of_media.append(i)
        numbers.append(number)
    return numbers


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers start, ..., start + length - 1 of each pair, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
