"""python -m engine.encode --data DIR --store DIR: encodes every video and image of a data folder with CLIP, once.

Worker processes decode and crop frames while CLIP encodes earlier ones. Every forward pass has the same shape: a short
batch is padded with black frames. A feature therefore does not depend on the other files of its batch, and a run that
was killed and resumed stores the same bytes as an uninterrupted one.

Under torchrun each process takes an equal share of the files, measured by length, and writes its own shards. The
processes share the folder and its failure log, and never wait for one another, so there is no process group.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dataloaders.cli import parse
from dataloaders.cpu import available_cores
from dataloaders.decode import torchcodec
from dataloaders.decode.dali import decoder as dali
from dataloaders.failures import LEDGER, Failure, Ledger, read_failures, report
from dataloaders.formats import present_splits
from dataloaders.media import list_media
from dataloaders.ranks import ALONE, Ranks
from dataloaders.records import RecordError
from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest, NonFiniteError
from dataloaders.store.tools import PITE_SAMPLING
from engine.encode.check import predict, verify
from engine.encode.config import EncodeConfig
from engine.encode.job import Job
from engine.encode.work import features_of, groups_of, partition_by_length

if TYPE_CHECKING:
    from pite.clip import ClipEncoder


@dataclass
class Summary:
    """Result of a run: media encoded, media that failed, and the number of files that each decoder decoded."""

    encoded: int = 0
    failed: int = 0
    decoders: Counter[str] = field(default_factory=Counter)


def encode(config: EncodeConfig, ranks: Ranks = ALONE) -> Summary:
    """Bring this rank's share of both stores up to date.

    Raises ValueError for a data folder, CLIP or store that cannot be used, and when failures exceed the budget.
    Features that were stored before the error are kept.
    """
    media, jobs = make_jobs(config, ranks)
    ledger, summary = Ledger(config.store / LEDGER, media, config.failure_budget), Summary()
    for job in jobs:
        _encode(job, ledger, ranks, summary)
    summary.failed = ledger.count
    return summary


def make_jobs(config: EncodeConfig, ranks: Ranks = ALONE) -> tuple[int, list[Job]]:
    """The number of media in the data folder's annotations, and this rank's jobs."""
    # Imported here: the decoding processes import this module, and need neither torch nor transformers.
    from pite.clip import ClipEncoder

    found = list_media(config.data, present_splits(config.data))
    media, nameless = found.media, found.malformed
    if len(nameless) > config.failure_budget * (len(nameless) + len(media)):
        raise RecordError(nameless[0])
    if nameless and ranks.rank == 0:
        print(f"{len(nameless):,} records name no media, the first: {nameless[0]}", file=sys.stderr)
    device = _device(config, ranks)
    {"dali": dali.require, "torchcodec": torchcodec.require}.get(config.decoder, lambda: None)()
    encoder = ClipEncoder(config.clip, device, compiled=device != "cpu")
    manifests = {
        "image": _manifest(encoder, 1, "still"),
        "video": _manifest(encoder, config.num_frames, PITE_SAMPLING),
    }
    jobs = []
    for kind, manifest in manifests.items():
        store = FeatureStore.create_or_open(config.store / f"{kind}s", manifest)
        groups = partition_by_length(groups_of(m for m in media if m.kind == kind), ranks.size)[ranks.rank]
        if groups:
            jobs.append(Job(groups[0][0].kind, groups, store, encoder, config, _workers(config, device, ranks)))
    return len(media), jobs


def _device(config: EncodeConfig, ranks: Ranks) -> str:
    """The device of this rank's CLIP. Selects that GPU, or on a CPU limits torch's threads to spare the decoders."""
    import torch

    device: str = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if device == "cpu":
        # Each thread needs a core, and the decoders need theirs.
        free = available_cores() // ranks.local_size - _workers(config, device, ranks)
        torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))
        return device
    if ranks.local >= torch.cuda.device_count():
        raise ValueError(f"{ranks.local_size} ranks on a machine with {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(ranks.local)
    return f"cuda:{ranks.local}"


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
    """Encode the files of a job that the store lacks, and add to the summary."""
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
