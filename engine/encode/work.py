"""Groups media by file, partitions them among ranks, and encodes decoded files in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tqdm import tqdm

from dataloaders.decode.containers import duration
from dataloaders.partition import longest_first
from dataloaders.ranks import Ranks
from dataloaders.records import Media

if TYPE_CHECKING:
    from torch import Tensor

    from dataloaders.decode.decoder import Decoded
    from pite.clip import ClipEncoder
    from pite.pooled import PooledEncoder

_OPENING = 0.5
"""Cost of opening a file, in seconds of video; the whole weight of a file whose header has no length."""

_LONGEST = 24 * 3600.0
_THREADS, _THREAD_ITEMS = 32, 64
T = TypeVar("T")
U = TypeVar("U")


def groups_of(media: Iterable[Media]) -> list[list[Media]]:
    """Media grouped by file and clip, in order; the same on every rank, independent of what the store holds.

    Two splits may link to one folder of videos: a file is encoded once and stored under each of its keys.
    """
    # Only folders are resolved: links are between folders, and resolving a million files on a network takes minutes.
    resolve = lru_cache(Path.resolve)
    groups: dict[object, list[Media]] = {}
    for m in media:
        groups.setdefault((resolve(m.path.parent), m.path.name, m.clip), []).append(m)
    return list(groups.values())


def seconds_of(media: Sequence[Media]) -> list[float]:
    """Length of each in seconds, from the clip's times or the file's header; 0 for a still or an unknown length."""

    def read_length(m: Media) -> float:
        if m.kind == "image":
            return 0.0
        if m.clip is not None:
            return max(0.0, m.clip[1] - m.clip[0])
        try:
            # A damaged header may hold any length.
            return min(duration(m.path) or 0.0, _LONGEST)
        except OSError:
            return 0.0

    return in_threads(read_length, media, "reading lengths")


def in_threads(function: Callable[[T], U], items: Sequence[T], what: str) -> list[U]:
    """The function's results for all items, computed in threads: a network file system handles many requests at once.

    what  name of the progress bar, which rank 0 shows after some seconds
    """
    parts = [items[i : i + _THREAD_ITEMS] for i in range(0, len(items), _THREAD_ITEMS)]
    results: list[U] = []
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        tqdm(desc=what, total=len(items), unit=" files", delay=5, disable=Ranks.read().rank > 0) as bar,
    ):
        for part in threads.map(lambda part: [function(item) for item in part], parts):
            results += part
            bar.update(len(part))
    return results


def partition_by_length(groups: Sequence[list[Media]], ranks: int) -> list[list[list[Media]]]:
    """Divide groups into `ranks` shares of nearly equal length in seconds, the same on every rank.

    `longest_first` assigns them; within a share they keep their order.
    """
    if ranks == 1:
        return [list(groups)]
    weights = [_OPENING + seconds for seconds in seconds_of([group[0] for group in groups])]
    shares, _ = longest_first(weights, ranks)
    return [[groups[place] for place in sorted(share)] for share in shares]


def rows_of(batch_size: int, num_frames: int) -> int:
    """Frames of each forward pass: those of whole files, where at least one fits."""
    return batch_size // num_frames * num_frames or batch_size


def encode_blank(encoder: ClipEncoder, num_frames: int, batch_size: int) -> None:
    """Encode a full batch of black frames, of the shape that all batches of videos have."""
    from pite.pooled import PooledEncoder

    side, videos = encoder.preprocess.crop, batch_size // num_frames or 1
    if isinstance(encoder, PooledEncoder):
        encoder.records(np.zeros((videos * num_frames, side, side, 3), np.uint8), [num_frames] * videos)
    else:
        encoder.encode(np.zeros((rows_of(batch_size, num_frames), side, side, 3), np.uint8))


def features_of(
    batch: Sequence[Decoded], encoder: ClipEncoder, num_frames: int, batch_size: int
) -> list[np.ndarray | None]:
    """The record (tokens, channels) of each decoded file of a batch; None for files without frames.

    Files may have fewer than `num_frames` frames where the encoder pools them.
    """
    good = [decoded.frames for decoded in batch if decoded.frames is not None]
    if not good:
        return [None] * len(batch)
    from pite.pooled import PooledEncoder

    if isinstance(encoder, PooledEncoder):
        records = iter(_videos(good, encoder, num_frames, batch_size))
    else:
        records = iter(_frames(good, encoder, num_frames, batch_size))
    return [None if decoded.frames is None else next(records) for decoded in batch]


def _frames(parts: Sequence[np.ndarray | Tensor], encoder: ClipEncoder, num_frames: int, batch_size: int) -> np.ndarray:
    """Records of a feature for each frame."""
    rows = rows_of(batch_size, num_frames)
    frames = _joined(parts, rows)
    encoded = [encoder.encode(frames[i : i + rows]).cpu().numpy() for i in range(0, len(frames), rows)]
    return np.concatenate(encoded)[: len(parts) * num_frames].reshape(len(parts), num_frames, -1)


def _videos(
    parts: Sequence[np.ndarray | Tensor], encoder: PooledEncoder, num_frames: int, batch_size: int
) -> list[np.ndarray]:
    """Records pooled over a video's frames; a video of fewer frames is padded, and the padding is not pooled."""
    videos, records = batch_size // num_frames or 1, list[np.ndarray]()
    for i in range(0, len(parts), videos):
        some = [_joined([part], num_frames) for part in parts[i : i + videos]]
        counts = [len(part) for part in parts[i : i + videos]] + [num_frames] * (videos - len(some))
        records.extend(encoder.records(_joined(some, videos * num_frames), counts)[: len(some)].cpu().numpy())
    return records


def _joined(parts: Sequence[np.ndarray | Tensor], rows: int) -> np.ndarray | Tensor:
    """Concatenated frames, padded with black to a multiple of `rows`; on the GPU if any of them is there."""
    length = sum(len(part) for part in parts)
    black = -length % rows
    if len(parts) == 1 and not black:
        return parts[0]
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate([*arrays, np.zeros((black, *arrays[0].shape[1:]), np.uint8)])
    import torch

    device = next(part.device for part in parts if not isinstance(part, np.ndarray))
    tensors = [torch.from_numpy(p).to(device) if isinstance(p, np.ndarray) else p for p in parts]
    return torch.cat([*tensors, tensors[0].new_zeros((black, *tensors[0].shape[1:]))])
