"""Tools for feature stores: verify, discard, merge.

Opening a store compares sizes only; `verify` reads every byte. A damaged shard loses only its own records: without its
index it is ignored, and engine.encode makes the missing records.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dataloaders.decode.sampling import IN_MANIFEST
from dataloaders.files import abandoned
from dataloaders.store.features import MANIFEST, FeatureStore, FeatureWriter, Manifest, lock, read_indices

PITE_SAMPLING = IN_MANIFEST["index"]
OTHER_OUTPUT = "give another OUTPUT"
"""Remedy for an output that holds records which were made with other settings."""

_RANK = re.compile(r"\.?(\d{5})[-.]")
"""Start of the name of a rank's files: shards, their indices, temporary files and locks."""


@dataclass(frozen=True)
class Report:
    """The result of `verify`.

    records, shards  number read
    damage           a sentence for each damaged shard, by its index file
    repeated         keys in more than one shard; readers take the last
    stray            shards without an index and temporary files, left by killed writers; `stray_bytes` in total
    """

    records: int
    shards: int
    damage: dict[Path, str]
    repeated: list[str]
    stray: list[Path]
    stray_bytes: int


def verify(path: Path, threads: int = 8) -> Report:
    """Read every record of a store and compare it with its checksum. Raises ValueError if `path` is no store."""
    manifest = Manifest.load(path)
    indices = read_indices(path, manifest)
    damage = {index: found.damage for index, found in indices.items() if found.damage is not None}
    whole = [index for index in indices if index not in damage]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda index: _damaged_record(index, indices[index].start, manifest), whole)
        damage |= {index: sentence for index, sentence in zip(whole, found) if sentence is not None}
    counts = Counter(key for index in whole for key in indices[index].keys)
    known = {file for index in indices for file in (index, index.with_suffix(".safetensors"))}
    stray = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".tmp") and p not in known]
    repeated = [key for key, count in counts.items() if count > 1]
    return Report(len(counts), len(whole), damage, repeated, stray, sum(map(_size, stray)))


def _size(file: Path) -> int:
    """Bytes; 0 for a file that a running writer has renamed meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def discard(path: Path) -> Report:
    """Like `verify`, and remove the indices of damaged shards and the files of killed writers.

    Raises ValueError and removes nothing while a process writes to the store, because its unfinished shard has no index
    yet and looks like that of a killed writer. Files of writers that start meanwhile are kept. Without locks, files of
    the last day are kept too, unless their process ran on this machine and has ended.
    """
    ranks = {int(found[1]) for file in path.iterdir() if (found := _RANK.match(file.name))}
    with ExitStack() as stack:
        locks = {rank: stack.enter_context(lock(path, rank)) for rank in sorted(ranks)}
        report = verify(path)
        for file in (*report.damage, *report.stray):
            found = _RANK.match(file.name)
            own = locks.get(int(found[1])) if found is not None else None
            locked = found is None or (own is not None and own.held)
            if abandoned(file, locked) or (own is not None and file in report.damage):
                file.unlink(missing_ok=True)
    return report


def _damaged_record(index: Path, start: int, manifest: Manifest) -> str | None:
    """Why a shard is damaged, with the first damaged record; None if it is good."""
    shard = index.with_suffix(".safetensors")
    table = pq.read_table(index)
    if "crc32" not in table.column_names:
        return f"the index {index} holds no checksums: an earlier version wrote it"
    keys, checksums = table["key"].to_pylist(), table["crc32"].to_pylist()
    shape = (len(keys), manifest.tokens, manifest.channels)
    with shard.open("rb") as file:
        header = json.loads(file.read(start)[8:])
    if header.get("features", {}).get("shape") != list(shape):
        return f"the header of the shard {shard} does not declare the shape {shape}"
    records = np.memmap(shard, np.uint8, "r", start).reshape(len(keys), -1)
    for key, checksum, record in zip(keys, checksums, records):
        if zlib.crc32(record.data) != checksum:
            return f"the shard {shard} holds other bytes for {key!r} than were written"
    return None


def merge(output: Path, sources: Sequence[Path], shard_records: int = 1024) -> int:
    """Copy the records of stores with equal manifests into one store, each key once. Returns the number copied.

    May be repeated after a kill. Raises ValueError if the manifests differ, or if two stores differ in a record.
    """
    stores = [FeatureStore(source) for source in sources]
    for store in stores[1:]:
        remedy = f"{stores[0].path} was made with the latter: merge only stores of the same settings"
        store.manifest.check(stores[0].manifest, store.path, remedy)
    merged = FeatureStore.create_or_open(output, stores[0].manifest, OTHER_OUTPUT)
    origin: dict[str, FeatureStore] = {key: merged for key in merged.keys}
    copied = 0
    with FeatureWriter(merged, shard_records=shard_records) as writer:
        for store in stores:
            decoders = store.decoders()
            for key in store.keys:
                first = origin.setdefault(key, store)
                if first is store:
                    writer.add({key: store.read(key)}, decoders[key])
                    copied += 1
                elif not np.array_equal(first.read(key).view(np.uint16), store.read(key).view(np.uint16)):
                    raise ValueError(f"{first.path} and {store.path} hold different features for {key!r}")
    return copied


def stores_in(path: Path, none_is_error: bool = True) -> list[Path]:
    """The store at `path`, or the stores in a folder that engine.encode filled. Raises ValueError without any."""
    if (path / MANIFEST).exists():
        return [path]
    stores = [manifest.parent for manifest in sorted(path.glob(f"*/{MANIFEST}"))]
    if not stores and none_is_error:
        raise ValueError(f"{path} is no feature store and holds none: make one with engine.encode")
    return stores
