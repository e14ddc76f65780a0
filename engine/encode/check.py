"""Estimates the cost of encoding (`--dry-run`) and verifies stored features (`--verify`)."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dataloaders.decode.decoder import Decoder
from dataloaders.records import Media
from engine.encode.measured import hours_on, measured_rates
from engine.encode.work import features_of, seconds_of

if TYPE_CHECKING:
    from engine.encode.job import Job
    from pite.clip import ClipEncoder

LEAST_COSINE = 0.999
"""Least cosine similarity of a stored feature and its verification: decoders and arithmetic differ a little."""

_SAMPLE = 6
"""Number of files that the dry run decodes."""


def verify(jobs: Sequence[Job], records: int) -> str:
    """Decode a random sample of the records of all stores with PyAV and encode them, and return a one-line comparison.

    PyAV decodes whatever stored the records: a decoder that takes wrong frames would take them again.

    Raises ValueError if a record does not match its file: a cosine below LEAST_COSINE in any frame.
    """
    stored = {job.kind: [m for group in job.groups for m in group if m.key in job.store] for job in jobs}
    number = _shares(records, {kind: len(media) for kind, media in stored.items()})
    drawn = {kind: random.sample(media, number[kind]) for kind, media in stored.items()}
    equal, least, wrong = 0, 1.0, []
    for job in jobs:
        media = drawn[job.kind]
        if not media:
            continue
        num_frames = job.store.manifest.num_frames
        with job.reference(len(media)) as decoder:
            results = zip(media, decoder.map(media))
            while batch := list(islice(results, max(1, job.batch_size // num_frames))):
                features = features_of([decoded for _, decoded in batch], job.encoder, num_frames, job.batch_size)
                for (m, decoded), record in zip(batch, features):
                    if record is None:
                        wrong.append(f"{m.key}: {decoded.reason}")
                        continue
                    was, now = job.store.read(m.key), record.astype(np.float16)
                    equal += was.tobytes() == now.tobytes()
                    cosine = _least_cosine(was, now)
                    least = min(least, cosine)
                    if not cosine >= LEAST_COSINE:
                        wrong.append(f"{m.key}: cosine {cosine:.4f} with what {decoded.media.path} gives now")
    counts = " and ".join(f"{len(drawn[kind]):,} of {len(media):,} {kind}s" for kind, media in stored.items())
    if wrong:
        raise ValueError(f"{len(wrong)} records are wrong, of {counts}; the first is {wrong[0]}")
    return f"{counts} verified: {equal:,} equal in every byte, least cosine {least:.6f}"


def _shares(records: int, stored: Mapping[str, int]) -> dict[str, int]:
    """How many of `records` to draw from each store: in proportion to its size, and at least one while there are any."""
    shares, left, total = {}, records, sum(stored.values())
    for kind, count in sorted(stored.items(), key=lambda item: item[1]):
        shares[kind] = min(count, left, max(1, round(left * count / max(total, 1))))
        left, total = left - shares[kind], total - count
    return shares


def _least_cosine(one: np.ndarray, two: np.ndarray) -> float:
    """Least cosine similarity between corresponding rows of two records (tokens, channels); 1 for two rows of zeros."""
    a, b = one.astype(np.float64), two.astype(np.float64)
    cosines = (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)
    return float(np.where(a.any(-1) | b.any(-1), cosines, 1.0).min())


def predict(job: Job, ranks: int) -> str:
    """The dry run's report for one kind of media: the store's size, and the time to encode the missing files.

    It decodes some files and runs CLIP a few times on this machine. Times for GPUs are from measurements of `bench.encode`
    where there are any, else from data sheets, and each line states which.
    """
    # Imported here: the decoding processes import engine.encode, and need no torch.
    from engine.hardware import CLIP_MFU, DEVICES

    missing, manifest = job.missing, job.store.manifest
    record = manifest.tokens * manifest.channels * 2
    keys, keys_missing = sum(map(len, job.groups)), sum(map(len, missing))
    free = shutil.disk_usage(job.store.path).free
    lengths = seconds_of([group[0] for group in missing])
    lines = [
        f"{job.kind}s",
        f"  records      {keys:,} of {record / 1e3:,.1f} kB: {keys * record / 1e9:,.3f} GB; {keys_missing:,} are missing,"
        f" {keys_missing * record / 1e9:,.3f} GB; {free / 1e9:,.0f} GB are free",
        f"  to decode    {len(missing):,} files"
        + (f", {sum(lengths) / 3600:,.2f} h by their headers" if job.kind == "video" else "")
        + f"; {job.num_absent:,} more are absent" * bool(job.num_absent),
    ]
    if not missing:
        return "\n".join(lines)
    with job.decoder(len(missing)) as decoder:
        decode = _seconds_per_file([group[0] for group in missing], lengths, decoder)
    clip = _seconds_per_frame(job.encoder, job.batch_size)
    hours = [rate * len(missing) / ranks / 3600 for rate in (decode, clip * manifest.num_frames)]
    lines.append(
        f"  here         {max(hours):,.2f} h, limited by {'decoding' if hours[0] > hours[1] else 'CLIP'} (the two overlap):"
        f" decoding {hours[0]:,.2f} h, {ranks / decode:,.1f} files/s; CLIP {hours[1]:,.2f} h, {ranks / clip:,.0f} frames/s"
        f" (measured now on {min(_SAMPLE, len(missing))} files and some frames, times {ranks} ranks)"
    )
    frames = float(manifest.num_frames * len(missing))
    for name in ("A100-80GB", "H100", "H200"):
        assumed = DEVICES[name].peak * CLIP_MFU / job.encoder.flops_per_frame
        rates = measured_rates(name, job.config.measured)
        lines.append(hours_on(name, rates, frames, sum(lengths), assumed))
    return "\n".join(lines)


def _seconds_per_file(media: Sequence[Media], lengths: Sequence[float], decoder: Decoder) -> float:
    """Seconds per file, measured on a sample with warm worker processes, and corrected for the sample's lengths."""
    chosen = random.Random(0).sample(range(len(media)), min(_SAMPLE, len(media)))
    sample = [media[i] for i in sorted(chosen)]
    list(decoder.map(sample[:1]))
    begin = time.perf_counter()
    list(decoder.map(sample))
    elapsed = (time.perf_counter() - begin) / len(sample)
    mean_of_sample = statistics.fmean(lengths[i] for i in chosen)
    return elapsed * (statistics.fmean(lengths) / mean_of_sample if mean_of_sample else 1)


def _seconds_per_frame(encoder: ClipEncoder, batch_size: int) -> float:
    """CLIP's seconds per frame, after a warm-up that compiles: full batches on a GPU, a few frames on the CPU."""
    rows = batch_size if encoder.device.type == "cuda" else min(batch_size, 4)
    side = encoder.preprocess.crop
    frames = np.random.default_rng(0).integers(0, 255, (rows, side, side, 3), dtype=np.uint8)
    from pite.pooled import PooledEncoder

    run = partial(encoder.records, counts=[rows]) if isinstance(encoder, PooledEncoder) else encoder.encode
    run(frames).cpu()
    begin, rounds = time.perf_counter(), 3
    for _ in range(rounds):
        run(frames).cpu()
    return (time.perf_counter() - begin) / rounds / rows
