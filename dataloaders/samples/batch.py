"""The packed batch: the one representation between the collator and the loss.

The collator makes all index lists here, once, on the CPU. The training step only gathers and scatters with them, so it
never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloaders.records import ABSENT, TokenizedSample
from dataloaders.samples.forest import Forest, find_prefixes, separate


@dataclass(frozen=True)
class PackedBatch:
    """T rows of S samples, without padding. What samples share is one segment; with nothing shared each is a segment.

    A sample's last token predicts nothing and no row attends to it, so it is not a row.

    token_ids        (T,) int64, 0 at the frames
    position_ids     (T,) int32, 0 in the first row of each sample
    cu_seqlens       (G + 1,) int32 segment boundaries; max_seqlen, the longest segment
    kv_rows          (K,) int64 rows that each segment attends to: its ancestors', then its own, with a causal mask
                     aligned at the end. None, as the next four: each segment attends to itself
    kv_inverse       (K,) int64 and kv_offsets (T + 1,) int64: row t is copied to the places
                     kv_inverse[kv_offsets[t]:kv_offsets[t + 1]] of kv_rows
    cu_seqlens_kv    (G + 1,) int32 boundaries in kv_rows; max_seqlen_kv, the longest
    features         (F, C) frame features; feature_rows (F,) int64, the rows they replace
    read_rows        (R,) int64, rising: the rows whose hidden states a head reads
    target_ids       (L,) int64 supervised tokens; target_rows (L,) int64, places in read_rows of the rows that predict
                     them. A shared row may predict the first tokens of several samples
    trajectory       (M, P, N, 2) float32, (-1, -1) where absent; trajectory_rows (M,) int64, places in read_rows
    normalizers      (2,) float32: divisors of the summed cross-entropy and of the summed L1, of the whole global batch
    num_tokens       tokens of the samples, the shared ones counted for each, and the last ones too
    sample_ids       for error messages
    Targets and trajectories stand in the order of the samples.
    """

    token_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    kv_rows: Tensor | None
    kv_inverse: Tensor | None
    kv_offsets: Tensor | None
    cu_seqlens_kv: Tensor | None
    max_seqlen_kv: int | None
    features: Tensor
    feature_rows: Tensor
    read_rows: Tensor
    target_ids: Tensor
    target_rows: Tensor
    trajectory: Tensor
    trajectory_rows: Tensor
    normalizers: Tensor
    num_tokens: int
    sample_ids: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """T, the rows that are computed."""
        return self.token_ids.numel()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device; asynchronous from pinned memory."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        return self._map(Tensor.pin_memory)

    def _map(self, fn) -> PackedBatch:  # type: ignore[no-untyped-def]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PackedBatch(**{k: fn(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def collate(
    samples: Sequence[TokenizedSample],
    features: Sequence[np.ndarray],
    *,
    normalizers: tuple[float, float] | None = None,
    share: bool = True,
) -> PackedBatch:
    """Pack samples and their frame features, (num_features, C) each, into one row.

    normalizers  (supervised tokens, coordinates) of the global batch; None if this batch is the global batch
    share        compute equal beginnings of samples once (`dataloaders.samples.forest`)
    Raises ValueError if a feature record does not fit its sample.
    """
    assert len(samples) == len(features)
    assert samples, "an empty batch has no shape"
    for sample, record in zip(samples, features):
        if record.shape[0] != sample.num_features:
            raise ValueError(
                f"sample {sample.id}: {record.shape[0]} features of media {sample.media!r} "
                f"for {sample.num_features} rows"
            )
        assert 1 < len(sample.token_ids) > sample.frame_start + sample.num_features, "a token follows the frames"
    lengths = np.array([len(s.token_ids) - 1 for s in samples], dtype=np.int64)
    forest = find_prefixes(samples, features) if share else separate(lengths)
    rows, bounds = forest.rows(forest.samples)  # the row of every position of every sample
    count = int(forest.lengths.sum())
    token_ids, position_ids = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int32)
    token_ids[rows] = np.concatenate([s.token_ids[:-1] for s in samples])
    position_ids[rows] = np.arange(len(rows)) - np.repeat(bounds[:-1], lengths)

    target_rows, trajectory_rows = (
        rows[np.concatenate([positions - 1 + start for positions, start in zip(of_samples, bounds)])]
        for of_samples in ([s.target_positions for s in samples], [s.trajectory_positions for s in samples])
    )
    read = np.zeros(count, dtype=bool)
    read[target_rows] = read[trajectory_rows] = True
    read[-1] |= not read.any()  # kernels need not handle a batch without rows
    place = np.cumsum(read) - 1

    trajectory = np.concatenate([s.trajectory for s in samples]).astype(np.float32, copy=False)
    if normalizers is None:
        normalizers = (len(target_rows), int((trajectory != ABSENT).all(-1).sum()) * 2)
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=_boundaries(forest.lengths),
        max_seqlen=int(forest.lengths.max()),
        **_keys(forest, count),
        **_features(samples, features, rows, bounds),
        read_rows=torch.from_numpy(np.flatnonzero(read)),
        target_ids=torch.from_numpy(
            np.concatenate([s.token_ids[s.target_positions] for s in samples]).astype(np.int64)
        ),
        target_rows=torch.from_numpy(place[target_rows]),
        trajectory=torch.from_numpy(trajectory),
        trajectory_rows=torch.from_numpy(place[trajectory_rows]),
        normalizers=torch.tensor(normalizers, dtype=torch.float32),
        num_tokens=int(lengths.sum()) + len(samples),
        sample_ids=tuple(s.id for s in samples),
    )


def _keys(forest: Forest, count: int) -> dict[str, Any]:
    """The fields about the rows that each segment attends to."""
    if not forest.shared:
        names = ("kv_rows", "kv_inverse", "kv_offsets", "cu_seqlens_kv", "max_seqlen_kv")
        return dict.fromkeys(names)
    rows, bounds = forest.rows(range(len(forest.paths)))
    copies = np.bincount(rows, minlength=count)
    return {
        "kv_rows": torch.from_numpy(rows),
        "kv_inverse": torch.from_numpy(rows.argsort(kind="stable")),
        "kv_offsets": torch.from_numpy(np.concatenate([[0], copies.cumsum()])),
        "cu_seqlens_kv": torch.from_numpy(bounds.astype(np.int32)),
        "max_seqlen_kv": int(np.diff(bounds).max()),
    }


def _features(
    samples: Sequence[TokenizedSample], features: Sequence[np.ndarray], rows: np.ndarray, bounds: np.ndarray
) -> dict[str, Any]:
    """Each record once, and the rows that it replaces."""
    frames: dict[int, tuple[int, np.ndarray]] = {}
    for i, (sample, start) in enumerate(zip(samples, bounds)):
        begin = start + sample.frame_start
        own = rows[begin : begin + sample.num_features]
        if len(own):
            frames.setdefault(int(own[0]), (i, own))
    return {
        "features": torch.from_numpy(np.concatenate([features[i] for i, _ in frames.values()] or [features[0]])),
        "feature_rows": torch.from_numpy(np.concatenate([own for _, own in frames.values()] or [rows[:0]])),
    }


def _boundaries(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
