"""Encodes a data folder: inventory, then each kind of media in batches. `engine.encode.__main__` is the command."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from tqdm import tqdm

from dataloaders.decode.decoder import Decoded, is_fallback
from dataloaders.decode.sampling import IN_MANIFEST
from dataloaders.errors import reason
from dataloaders.failures import LEDGER, Failure, Ledger, read_failures, reason_kind, report
from dataloaders.media import duration_error, wrong_duration
from dataloaders.ranks import ALONE, Part, Ranks
from dataloaders.records import Media
from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest, NonFiniteError
from engine.encode.backend import Backend, choose_backend
from engine.encode.check import predict, verify
from engine.encode.config import EncodeConfig
from engine.encode.inventory import Inventory, take_inventory
from engine.encode.job import ENGINES, Job
from engine.encode.share import agreed_share
from engine.encode.work import encode_blank, features_of, groups_of, partition_by_length

if TYPE_CHECKING:
    import numpy as np

    from pite.clip import ClipEncoder

log = logging.getLogger(__name__)


@dataclass
class Summary:
    """Result of a run: media encoded, media that failed, and the number of files that each decoder decoded.

    inexact  media whose file differs in duration from its annotation by more than the share of a frame, though not so much
             that it is refused
    uneven   files of which sampling by index and by time choose frames that are further apart than a frame's share
    cut_before  files that are the clip of their record, though its times are those in the source
    shown  kinds of failures and fallbacks whose first example was logged
    """

    encoded: int = 0
    failed: int = 0
    inexact: int = 0
    uneven: int = 0
    cut_before: int = 0
    decoders: Counter[str] = field(default_factory=Counter)
    shown: set[str] = field(default_factory=set)

    def add(self, group: Sequence[Media], decoded: Decoded) -> None:
        """Count a file that was encoded, and log the first one of each fallback."""
        self.encoded += len(group)
        self.decoders[decoded.by] += 1
        self.uneven += decoded.facts.uneven
        self.cut_before += decoded.facts.cut_before
        if is_fallback(decoded.by):
            self.show_first(decoded.by, "%s: decoded by %s", group[0].path, decoded.by)

    def fail(self, group: Sequence[Media], stage: str, reason: str, ledger: Ledger) -> None:
        """Log media that gave no features. Raises BudgetExceeded if they are too many."""
        self.show_first(reason_kind(reason, str(group[0].path), group[0].key), "%s", reason)
        for m in group:
            ledger.add(Failure(m.key, str(m.path), stage, reason))

    def show_first(self, kind: str, message: str, *arguments: object) -> None:
        """Log the first example of a kind when it happens. The end of the run counts them."""
        if kind not in self.shown:
            self.shown.add(kind)
            log.warning(f"{message} (the first; all are counted at the end)", *arguments)


def run(config: EncodeConfig, ranks: Ranks) -> None:
    """The command: encode, predict or verify, and print the result. Raises ValueError as `encode` does."""
    if config.dry_run:
        if ranks.rank == 0:
            inventory, jobs = prepare(config)
            print(*(predict(job, ranks.size) for job in jobs), sep="\n")
            if sentence := inventory.over_budget(config.failure_budget):
                print(f"a run would stop: {sentence}")
        return
    if config.verify:
        print(verify(prepare(config, ranks)[1], config.verify))
        return
    summary = encode(config, ranks)
    who = f"rank {ranks.rank} of {ranks.size}: " * (ranks.size > 1)
    failed = f", {summary.failed:,} failed: see failures.*.jsonl" * bool(summary.failed)
    print(f"{who}{summary.encoded:,} media encoded into {config.store}{failed}")
    if failed and not ranks.rank:
        keys = {key for kind in ("images", "videos") for key in FeatureStore(config.store / kind).keys}
        print(report(read_failures(config.store / LEDGER), keys))
    if summary.inexact:
        log.warning(
            "%s files differ in duration from their annotation by more than a frame's share, though less than is refused",
            f"{summary.inexact:,}",
        )
    if summary.cut_before:
        log.info(
            "%s files are clips that were cut before, since they last as long as their record's clip and end before it: used"
            " whole",
            f"{summary.cut_before:,}",
        )
    if summary.uneven and config.choices.sampling == "index":
        log.warning(
            "%s files have a variable frame rate: frames sampled by index are more than a frame's share away from the times"
            " of their labels; --sampling time, with another --store, avoids it",
            f"{summary.uneven:,}",
        )
    for by, files in summary.decoders.most_common():
        log.log(logging.WARNING if is_fallback(by) else logging.INFO, "decoded by %s: %s files", by, f"{files:,}")


def encode(config: EncodeConfig, ranks: Ranks = ALONE) -> Summary:
    """Bring this rank's share of both stores up to date.

    Raises ValueError for a data folder, CLIP or store that cannot be used, and when failures exceed the budget: before
    CLIP is loaded if too many files are absent. Features that were stored before the error are kept.
    """
    backend = _with_share(choose_backend(config, ranks), config, write=True)
    inventory = take_inventory(config, ranks)
    ledger, summary = Ledger(config.store / LEDGER, len(inventory.media), config.failure_budget), Summary()
    inventory.log_absent(ledger, logs_them=ranks.rank == 0 and Part.parse(config.part).number == 1)
    for job in make_jobs(config, inventory, backend, ranks):
        _encode(job, ledger, ranks, summary)
    summary.failed = ledger.count
    return summary


def prepare(config: EncodeConfig, ranks: Ranks = ALONE) -> tuple[Inventory, list[Job]]:
    """The inventory and this rank's jobs, to look at the stores without encoding."""
    backend = _with_share(choose_backend(config, ranks), config, write=False)
    inventory = take_inventory(config, ranks)
    return inventory, make_jobs(config, inventory, backend, ranks)


def _with_share(backend: Backend, config: EncodeConfig, write: bool) -> Backend:
    """The backend with the CPU's share of the store, which the first run with DALI stores if it may `write`."""
    if backend.decoder not in ENGINES:
        return backend
    share = agreed_share(config.store, config.cpu_share, backend.cpu_share, write)
    log.info("the CPU decodes %.0f%% of the videos, the GPU the others", 100 * share)
    return replace(backend, cpu_share=share)


def make_jobs(config: EncodeConfig, inventory: Inventory, backend: Backend, ranks: Ranks) -> list[Job]:
    """Load CLIP, open or create the stores, and take this rank's share of each kind of media."""
    chosen, encoder = config.choices, _load_encoder(config, backend.device)
    manifests = {"video": _manifest(encoder, config.num_frames, IN_MANIFEST[chosen.sampling])}
    if 1 in chosen.stages:  # of stills
        manifests = {"image": _manifest(encoder, 1, "still"), **manifests}
    jobs = []
    for kind, manifest in manifests.items():
        store = FeatureStore.create_or_open(config.store / f"{kind}s", manifest)
        # Absent files are partitioned too: the shares must not depend on the moment at which a rank looked for them.
        # First into parts: hosts may have different numbers of ranks.
        groups = groups_of(m for m in inventory.media if m.kind == kind)
        part = Part.parse(config.part)
        groups = partition_by_length(partition_by_length(groups, part.count)[part.number - 1], ranks.size)[ranks.rank]
        if groups:
            jobs.append(Job(groups[0][0].kind, groups, inventory.absent.keys(), store, encoder, config, backend))
    return jobs


def _load_encoder(config: EncodeConfig, device: str) -> ClipEncoder:
    """CLIP, compiled on a GPU if a first batch can be encoded so: without a C compiler it cannot."""
    # Imported here: the decoding processes import this module, and need neither torch nor transformers.
    from pite.pooled import load_encoder

    chosen = config.choices
    if device == "cpu":
        return load_encoder(chosen, chosen.clip, device)
    encoder = load_encoder(chosen, chosen.clip, device, compiled=True)
    try:
        encode_blank(encoder, config.num_frames, config.batch_size)
    except Exception as error:  # Inductor, Triton and the compiler raise many.
        log.warning(
            "torch.compile fails here (%s): CLIP runs without it; install a C compiler, such as gcc", reason(error)
        )
        return load_encoder(chosen, chosen.clip, device)
    return encoder


def _manifest(encoder: ClipEncoder, num_frames: int, sampling: str) -> Manifest:
    return Manifest(
        encoder=encoder.checksum,
        num_frames=num_frames,
        sampling=sampling,
        preprocess=encoder.preprocess.describe(),
        tokens=encoder.tokens(num_frames),
        channels=encoder.channels,
        compute_dtype=str(encoder.model.dtype).removeprefix("torch."),
        extractor=encoder.extractor,
    )


def _store(
    group: Sequence[Media],
    decoded: Decoded,
    record: np.ndarray | None,
    writer: FeatureWriter,
    ledger: Ledger,
    summary: Summary,
) -> bool:
    """Store the record of a file under each of its keys, or log why not. Returns whether it was stored."""
    if record is None:
        summary.fail(group, "decode", decoded.reason, ledger)
        return False
    kept = []
    for m in group:
        whole = replace(m, clip=None) if decoded.facts.cut_before else m
        # After decoding, which finds the reason why a damaged file is short.
        if reason := wrong_duration(whole, decoded.facts.ends):
            summary.fail([m], "check", reason, ledger)
        else:
            kept.append(m)
            error = abs(duration_error(whole, decoded.facts.ends) or 0.0)
            summary.inexact += m.duration is not None and error > m.duration / len(record)
    try:
        writer.add({m.key: record for m in kept}, decoded.by)
    except NonFiniteError as error:
        summary.fail(kept, "encode", str(error), ledger)
        return False
    if kept:
        summary.add(kept, decoded)
    return bool(kept)


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
        FeatureWriter(
            job.store, Part.parse(job.config.part).writer(ranks.rank), job.config.choices.shard_records
        ) as writer,
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
                if _store(group, decoded, record, writer, ledger, summary):
                    frames += num_frames
            elapsed = time.perf_counter() - started
            rate = f"{frames / elapsed:,.0f} frames/s, {waited / elapsed:.0%} waiting for decode"
            bar.set_postfix_str(rate, refresh=False)
            bar.update(sum(len(group) for group, _ in batch))
