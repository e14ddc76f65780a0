"""python -m engine.encode --data DIR --store DIR: every video and image of a data folder through CLIP, once.

Frames are decoded and cropped in processes of their own while CLIP works on earlier ones. A forward pass always has
the same shape, filled up with black where a batch is short, so that a feature does not depend on what was encoded
beside it: a run that was killed and resumed stores the same bytes as one that was not.

Under torchrun each process takes an equal share of the files by their length, and writes shards of its own. They share
the folder and its ledger, and never wait for one another, so there is no process group.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from dataloaders import dali, torchcodec
from dataloaders.cpu import available_cores
from dataloaders.decode import TIME_LIMIT, DecodePool, Decoder, decode_cropped
from dataloaders.formats import iter_media, present_rooms
from dataloaders.ledger import LEDGER, Failure, Ledger, read_failures, report
from dataloaders.records import Media, RecordError
from dataloaders.store import FeatureStore, FeatureWriter, Manifest, NonFiniteError
from engine.config import parse
from engine.encode_check import predict, verify
from engine.encode_work import features_of, groups_of, share_out

if TYPE_CHECKING:
    from pite.clip import ClipEncoder


@dataclass(frozen=True)
class EncodeConfig:
    """Decode and encode all media that the annotations of a data folder name.

    Runs again where it was stopped. Files that cannot be decoded are listed in STORE/failures.*.jsonl and tried again
    by the next run.
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
    time_limit: float = TIME_LIMIT
    """seconds after which a file that is still being decoded is given up and its process killed (not kept by 0 workers), and
    a batch that DALI gives nothing of goes to PyAV"""
    shard_records: int = 1024
    """records per shard, the most that a kill can cost"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where CLIP runs"""
    decoder: Literal["auto", "pyav", "dali", "torchcodec"] = "auto"
    """what decodes; auto is DALI where CLIP runs on a GPU and DALI is installed, else PyAV. What DALI cannot decode goes to
    PyAV, file by file"""
    verify: int = 0
    """instead of encoding, decode and encode so many records of the store again, drawn at random, and compare"""
    dry_run: bool = False
    """instead of encoding, say how large the store will be and how long it will take; makes empty stores at most"""

    def __post_init__(self) -> None:
        for name in ("num_frames", "batch_size", "shard_records"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, not {self.workers}")
        if self.verify < 0 or self.time_limit <= 0:
            raise ValueError("--verify must be 0 or more, and --time-limit more than 0")
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


@dataclass
class Summary:
    """What a run did: media encoded, media that failed, and how many files each decoder gave frames of."""

    encoded: int = 0
    failed: int = 0
    decoders: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Job:
    """This rank's media of one kind: groups of those that share a file, the store, and who decodes and encodes."""

    kind: Literal["video", "image"]
    groups: list[list[Media]]
    store: FeatureStore
    encoder: ClipEncoder
    config: EncodeConfig
    workers: int

    @property
    def batch_size(self) -> int:
        """Frames per forward pass."""
        return self.config.batch_size

    @property
    def missing(self) -> list[list[Media]]:
        return [group for whole in self.groups if (group := [m for m in whole if m.key not in self.store])]

    def decoder(self, files: int) -> AbstractContextManager[Decoder]:
        """A decoder for so many files."""
        num_frames, preprocess = self.store.manifest.num_frames, self.encoder.preprocess
        limit = self.config.time_limit
        chosen = _chosen_decoder(self.config, self.encoder.device.type)
        workers = min(files, self.workers)
        if chosen == "dali":
            return dali.DaliDecoder(
                self.kind, num_frames, preprocess, self.encoder.device.type, workers, time_limit=limit
            )
        decode = partial(decode_cropped, num_frames=num_frames, preprocess=preprocess)
        if chosen == "torchcodec" and self.kind == "video":
            return DecodePool(partial(decode, reader="torchcodec"), workers, time_limit=limit, by="torchcodec")
        return DecodePool(decode, workers, time_limit=limit)


def encode(config: EncodeConfig, ranks: Ranks = Ranks()) -> Summary:
    """Bring this rank's share of both stores up to date.

    Raises ValueError for a data folder, CLIP or store that cannot be used, and when failures exceed the budget; what
    was encoded until then is kept.
    """
    media, jobs = make_jobs(config, ranks)
    ledger, summary = Ledger(config.store / LEDGER, media, config.failure_budget), Summary()
    for job in jobs:
        _encode(job, ledger, ranks, summary)
    summary.failed = ledger.count
    return summary


def make_jobs(config: EncodeConfig, ranks: Ranks = Ranks()) -> tuple[int, list[Job]]:
    """How many media the data folder names, and this rank's part of them."""
    # Decoding processes import this module, and need neither torch nor transformers.
    from pite.clip import ClipEncoder

    nameless: list[RecordError] = []
    media = list(iter_media(config.data, present_rooms(config.data), nameless.append))
    if len(nameless) > config.failure_budget * (len(nameless) + len(media)):
        raise nameless[0]
    if nameless and ranks.rank == 0:
        print(f"{len(nameless):,} records name no media, the first: {nameless[0]}", file=sys.stderr)
    device = _device(config, ranks)
    {"dali": dali.require, "torchcodec": torchcodec.require}.get(config.decoder, lambda: None)()
    encoder = ClipEncoder(config.clip, device, compiled=device != "cpu")
    manifests = {
        "image": _manifest(encoder, 1, "still"),
        "video": _manifest(encoder, config.num_frames, "linspace truncated"),
    }
    jobs = []
    for kind, manifest in manifests.items():
        store = FeatureStore.create_or_open(config.store / f"{kind}s", manifest)
        groups = share_out(groups_of(m for m in media if m.kind == kind), ranks.size)[ranks.rank]
        if groups:
            jobs.append(Job(groups[0][0].kind, groups, store, encoder, config, _workers(config, device, ranks)))
    return len(media), jobs


def _device(config: EncodeConfig, ranks: Ranks) -> str:
    """Where this rank's CLIP runs; takes that GPU, or leaves the decoders their cores."""
    import torch

    device: str = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if device == "cpu":
        # Threads that wait for a core spin on it, and would take it from the decoders.
        free = available_cores() // ranks.local_size - _workers(config, device, ranks)
        torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))
        return device
    if ranks.local >= torch.cuda.device_count():
        raise ValueError(f"{ranks.local_size} ranks on a machine with {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(ranks.local)
    return f"cuda:{ranks.local}"


def _chosen_decoder(config: EncodeConfig, device: str) -> str:
    if config.decoder != "auto":
        return config.decoder
    if device == "cuda":
        try:
            dali.require()
        except ValueError as error:
            print(f"engine.encode: {error}: decoding on the CPU", file=sys.stderr)
        else:
            return "dali"
    return "pyav"


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


def _encode(job: Job, ledger: Ledger, ranks: Ranks, summary: Summary) -> None:
    """Encode what a store lacks of a job, adding to the summary."""
    groups = job.missing
    if not groups:
        return
    total, todo = sum(map(len, job.groups)), sum(map(len, groups))
    num_frames, batch_size = job.store.manifest.num_frames, job.config.batch_size
    frames, waited, started = 0, 0.0, time.perf_counter()
    with (
        job.decoder(len(groups)) as decoder,
        FeatureWriter(job.store, ranks.rank, job.config.shard_records) as writer,
        tqdm(
            total=total,
            initial=total - todo,
            unit=f" {job.kind}s",
            smoothing=0.05,
            disable=ranks.rank > 0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
        ) as bar,
    ):
        results = zip(groups, decoder.map(group[0] for group in groups))
        while True:
            before = time.perf_counter()
            batch = list(islice(results, max(1, batch_size // num_frames)))
            waited += time.perf_counter() - before
            if not batch:
                return
            features = features_of([decoded for _, decoded in batch], job.encoder, num_frames, batch_size)
            for (group, decoded), record in zip(batch, features):
                stage, reason = "decode", decoded.reason
                if record is not None:
                    summary.decoders[decoded.by] += 1
                    try:
                        writer.add({m.key: record for m in group})
                        summary.encoded += len(group)
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


def _workers(config: EncodeConfig, device: str, ranks: Ranks) -> int:
    if config.workers is not None:
        return config.workers
    return max(1, available_cores() // ranks.local_size // (2 if device == "cpu" else 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error."""
    config = parse(EncodeConfig, argv, prog="python -m engine.encode")
    ranks = Ranks.read()
    try:
        if config.dry_run:
            if ranks.rank == 0:
                print(*(predict(job, ranks.size) for job in make_jobs(config)[1]), sep="\n")
            return 0
        if config.verify:
            print(verify(make_jobs(config, ranks)[1], config.verify))
            return 0
        summary = encode(config, ranks)
    except (ValueError, OSError) as error:
        print(f"engine.encode: {error}", file=sys.stderr)
        return 1
    who = f"rank {ranks.rank} of {ranks.size}: " * (ranks.size > 1)
    failed = f", {summary.failed:,} failed: see failures.*.jsonl" * bool(summary.failed)
    print(f"{who}{summary.encoded:,} media encoded into {config.store}{failed}")
    if failed and not ranks.rank:
        print(report(read_failures(config.store / LEDGER), _keys(config.store)))
    for by, files in sorted(summary.decoders.items()):
        print(f"{who}decoded by {by}: {files:,}", file=sys.stderr)
    return 0


def _keys(folder: Path) -> set[str]:
    return {key for kind in ("images", "videos") for key in FeatureStore(folder / kind).keys}


if __name__ == "__main__":
    sys.exit(main())
