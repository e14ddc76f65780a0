"""The packed batch: the one representation between the collator and the loss.

The collator makes all index lists here, once, on the CPU. The training step only gathers and scatters with them, so it
never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dataloaders.records import ABSENT, TokenizedSample


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of S samples in one row, without padding.

    token_ids        (T,) int64, 0 at the frames
    position_ids     (T,) int32, restarts at 0 for each sample
    cu_seqlens       (S + 1,) int32 sample boundaries; max_seqlen, the longest sample
    features         (F, C) frame features; feature_rows (F,) int64, the rows they replace
    target_ids       (L,) int64 supervised tokens; target_rows (L,) int64, the hidden rows that predict them
    trajectory       (M, P, N, 2) float32, (-1, -1) where absent; trajectory_rows (M,) int64
    normalizers      (2,) float32: divisors of the summed cross-entropy and of the summed L1, of the whole global batch
    sample_ids       for error messages
    """

    token_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    features: Tensor
    feature_rows: Tensor
    target_ids: Tensor
    target_rows: Tensor
    trajectory: Tensor
    trajectory_rows: Tensor
    normalizers: Tensor
    sample_ids: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
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
) -> PackedBatch:
    """Pack samples and their frame features, (num_frames, C) each, into one row.

    normalizers  (supervised tokens, coordinates) of the global batch; None if this batch is the global batch
    Raises ValueError if a feature record does not fit its sample.
    """
    assert len(samples) == len(features)
    assert samples, "an empty batch has no shape"
    for sample, record in zip(samples, features):
        if record.shape[0] != sample.num_frames:
            raise ValueError(
                f"sample {sample.id}: {record.shape[0]} features of media {sample.media!r} "
                f"for {sample.num_frames} frames"
            )
    lengths = np.array([len(s.token_ids) for s in samples], dtype=np.int64)
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    starts = boundaries[:-1]

    target_rows = [s.target_positions - 1 + start for s, start in zip(samples, starts)]
    targets = [s.token_ids[s.target_positions] for s in samples]
    trajectory = np.concatenate([s.trajectory for s in samples]).astype(np.float32, copy=False)
    if normalizers is None:
        present = int((trajectory != ABSENT).all(-1).sum()) * 2
        normalizers = (sum(map(len, targets)), present)
    return PackedBatch(
        token_ids=torch.from_numpy(np.concatenate([s.token_ids for s in samples]).astype(np.int64, copy=False)),
        position_ids=torch.from_numpy(
            np.arange(boundaries[-1], dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
        ),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        features=torch.from_numpy(np.concatenate(features)),
        feature_rows=_concatenate(
            [np.arange(s.num_frames) + s.frame_start + start for s, start in zip(samples, starts)]
        ),
        target_ids=_concatenate(targets),
        target_rows=_concatenate(target_rows),
        trajectory=torch.from_numpy(trajectory),
        trajectory_rows=_concatenate([s.trajectory_positions - 1 + start for s, start in zip(samples, starts)]),
        normalizers=torch.tensor(normalizers, dtype=torch.float32),
        sample_ids=tuple(s.id for s in samples),
    )


def _concatenate(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
