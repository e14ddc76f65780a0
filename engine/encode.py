"""python -m engine.encode --data DIR --store DIR: every video and image of a data folder through CLIP, once.

Frames are decoded and cropped in processes of their own while CLIP works on earlier ones. A forward pass always has
the same shape, filled up with black where a batch is short, so that a feature does not depend on what was encoded
beside it: a run that was killed and resumed stores the same bytes as one that was not.

Under torchrun each process takes every WORLD_SIZE-th file and writes shards of its own. They share the folder and its
ledger, and never wait for one another, so there is no process group.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from dataloaders.decode import Decoded, DecodePool, decode_cropped
from dataloaders.formats import iter_media, present_rooms
from dataloaders.ledger import LEDGER, Failure, Ledger
from dataloaders.records import Media
from dataloaders.store import FeatureStore, FeatureWriter, Manifest, NonFiniteError
from engine.config import parse

if TYPE_CHECKING:
    from pite.clip import ClipEncoder


@dataclass(frozen=True)
class EncodeConfig:
    """Decode and encode all media that the annotations of a data folder name.

    Runs again where it was stopped. Files that cannot be decoded are written to STORE/failures.jsonl and tried again by
    the next run.
    """

    data: Path
    """data folder (layout: docs/data.md)"""
    store: Path
    """where features go: STORE/images and STORE/videos"""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP in Hugging Face format, a folder or a name on the hub"""
    num_frames: int = 100
    """frames per video"""
    batch_size: int = 200
    """frames per forward pass"""
    workers: int | None = None
    """decoding processes of each rank, 0 to decode in the rank's own; none for one per core, or per two cores where CLIP
    runs on the CPU, shared by the ranks of a machine"""
    failure_budget: float = 0.01
    """share of media that may fail before the run stops"""
    shard_records: int = 1024
    """records per shard, the most that a kill can cost"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where CLIP runs"""

    def __post_init__(self) -> None:
        for name in ("num_frames", "batch_size", "shard_records"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, not {self.workers}")
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"--failure-budget is a share between 0 and 1, not {self.failure_budget}")


@dataclass(frozen=True)
class Ranks:
    """This process among those that encode one data folder: `rank` of `size`, `local` of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @staticmethod
    def read() -> Ranks:
        """From torchrun's environment; one process without it."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return Ranks(*(int(os.environ.get(name, default)) for name, default in names.items()))


def encode(config: EncodeConfig, ranks: Ranks = Ranks()) -> tuple[int, int]:
    """Bring this rank's share of both stores up to date. Returns media that it encoded, and media of it that failed.

    Raises ValueError for a data folder, CLIP or store that cannot be used, and when failures exceed the budget; what
    was encoded until then is kept.
    """
    # Decoding processes import this module, and need neither torch nor transformers.
    import torch

    from pite.clip import ClipEncoder

    media = list(iter_media(config.data, present_rooms(config.data)))
    device: str = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if device == "cpu":
        # Threads that wait for a core spin on it, and would take it from the decoders.
        free = _cores() // ranks.local_size - _workers(config, device, ranks)
        torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))
    else:
        if ranks.local >= torch.cuda.device_count():
            raise ValueError(f"{ranks.local_size} ranks on a machine with {torch.cuda.device_count()} GPUs")
        device = f"cuda:{ranks.local}"
        torch.cuda.set_device(device)
    encoder = ClipEncoder(config.clip, device)
    stores = {
        "image": FeatureStore.create_or_open(config.store / "images", _manifest(encoder, 1, "still")),
        "video": FeatureStore.create_or_open(
            config.store / "videos", _manifest(encoder, config.num_frames, "linspace truncated")
        ),
    }
    ledger = Ledger(config.store / LEDGER, len(media), config.failure_budget)
    encoded = sum(
        _encode_kind([m for m in media if m.kind == kind], store, encoder, ledger, config, ranks)
        for kind, store in stores.items()
    )
    return encoded, ledger.count


def _manifest(encoder: ClipEncoder, num_frames: int, sampling: str) -> Manifest:
    return Manifest(
        encoder=encoder.checksum,
        num_frames=num_frames,
        sampling=sampling,
        preprocess=encoder.preprocess.describe(),
        tokens=num_frames,
        channels=encoder.channels,
        compute_dtype=str(encoder.model.dtype).removeprefix("torch."),
    )


def _encode_kind(
    media: Sequence[Media],
    store: FeatureStore,
    encoder: ClipEncoder,
    ledger: Ledger,
    config: EncodeConfig,
    ranks: Ranks,
) -> int:
    """Encode the media of this rank that a store lacks; returns how many were encoded."""
    share = _groups(media)[ranks.rank :: ranks.size]
    groups = [missing for group in share if (missing := [m for m in group if m.key not in store])]
    if not groups:
        return 0
    total, todo = sum(map(len, share)), sum(map(len, groups))
    num_frames = store.manifest.num_frames
    decode = partial(decode_cropped, num_frames=num_frames, preprocess=encoder.preprocess)
    workers = min(len(groups), _workers(config, encoder.device.type, ranks))
    encoded, frames, waited, started = 0, 0, 0.0, time.perf_counter()
    with (
        DecodePool(decode, workers) as pool,
        FeatureWriter(store, ranks.rank, config.shard_records) as writer,
        tqdm(
            total=total, initial=total - todo, unit=f" {media[0].kind}s", smoothing=0.05, disable=ranks.rank > 0
        ) as bar,
    ):
        results = zip(groups, pool.map(group[0] for group in groups))
        while True:
            before = time.perf_counter()
            batch = list(islice(results, max(1, config.batch_size // num_frames)))
            waited += time.perf_counter() - before
            if not batch:
                return encoded
            features = _features([decoded for _, decoded in batch], encoder, num_frames, config.batch_size)
            for (group, decoded), record in zip(batch, features):
                stage, reason = "decode", decoded.reason
                if record is not None:
                    try:
                        writer.add({m.key: record for m in group})
                        encoded += len(group)
                        frames += num_frames
                        continue
                    except NonFiniteError as error:
                        stage, reason = "encode", str(error)
                for m in group:
                    ledger.add(Failure(m.key, str(m.path), stage, reason))
            elapsed = time.perf_counter() - started
            rate = f"{frames / elapsed:,.0f} frames/s, {waited / elapsed:.0%} waiting for decode"
            bar.set_postfix_str(rate, refresh=False)
            bar.update(sum(len(group) for group, _ in batch))


def _groups(media: Iterable[Media]) -> list[list[Media]]:
    """Media by file and clip, in order, the same on every rank whatever is in the store by now.

    Two rooms may link to one folder of videos: a file is encoded once and stored under each of its keys.
    """
    # Links are between folders; to resolve a million files on a network takes minutes.
    resolve = lru_cache(Path.resolve)
    groups: dict[object, list[Media]] = {}
    for m in media:
        groups.setdefault((resolve(m.path.parent), m.path.name, m.split), []).append(m)
    return list(groups.values())


def _workers(config: EncodeConfig, device: str, ranks: Ranks) -> int:
    if config.workers is not None:
        return config.workers
    return max(1, _cores() // ranks.local_size // (1 if device == "cuda" else 2))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _features(
    batch: Sequence[Decoded], encoder: ClipEncoder, num_frames: int, batch_size: int
) -> list[np.ndarray | None]:
    """Features (num_frames, channels) of each decoded file of a batch; None for those without frames."""
    good = [decoded.frames for decoded in batch if decoded.frames is not None]
    if not good:
        return [None] * len(batch)
    rows = batch_size // num_frames * num_frames or batch_size
    frames = np.concatenate(good)
    padded = np.zeros((-(-len(frames) // rows) * rows, *frames.shape[1:]), dtype=np.uint8)
    padded[: len(frames)] = frames
    encoded = [encoder.encode(padded[i : i + rows]).cpu().numpy() for i in range(0, len(padded), rows)]
    records = iter(np.concatenate(encoded)[: len(frames)].reshape(len(good), num_frames, -1))
    return [None if decoded.frames is None else next(records) for decoded in batch]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error."""
    config = parse(EncodeConfig, argv, prog="python -m engine.encode")
    ranks = Ranks.read()
    try:
        encoded, failed = encode(config, ranks)
    except (ValueError, OSError) as error:
        print(f"engine.encode: {error}", file=sys.stderr)
        return 1
    who = f"rank {ranks.rank} of {ranks.size}: " * (ranks.size > 1)
    print(
        f"{who}{encoded:,} media encoded into {config.store}"
        + f", {failed:,} failed: see failures.jsonl" * bool(failed)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
