"""python -m dataloaders.store inspect|verify|merge|import: feature stores from the outside.

Opening a store compares sizes only; `verify` reads every byte. A damaged shard costs its own records and no others:
without its index it does not exist, and engine.encode makes what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dataloaders.store import FeatureStore, FeatureWriter, Manifest, read_indices

_AS_PITE = "linspace truncated"


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    records, shards  that were read
    damage           a sentence for each damaged shard, by its index file
    repeated         keys that more than one shard holds; readers take the last
    stray            files without an index or a name, which killed writers left
    """

    records: int
    shards: int
    damage: dict[Path, str]
    repeated: list[str]
    stray: list[Path]


def verify(path: Path, threads: int = 8) -> Report:
    """Read every record of a store and compare it with its checksum. Raises ValueError where `path` is no store."""
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
    return Report(len(counts), len(whole), damage, repeated, stray)


def _damaged_record(index: Path, start: int, manifest: Manifest) -> str | None:
    """Why a shard cannot be trusted, naming the first record at fault."""
    shard = index.with_suffix(".safetensors")
    table = pq.read_table(index)
    if "crc32" not in table.column_names:
        return f"the index {index} holds no checksums: an earlier version wrote it"
    keys, checksums = table["key"].to_pylist(), table["crc32"].to_pylist()
    shape = (len(keys), manifest.tokens, manifest.channels)
    with shard.open("rb") as file:
        header = json.loads(file.read(start)[8:])
    if header.get("features", {}).get("shape") != list(shape):
        return f"the shard {shard} does not say that it holds {shape}"
    records = np.memmap(shard, np.uint8, "r", start).reshape(len(keys), -1)
    for key, checksum, record in zip(keys, checksums, records):
        if zlib.crc32(record.data) != checksum:
            return f"the shard {shard} holds other bytes for {key!r} than were written"
    return None


def merge(output: Path, sources: Sequence[Path], shard_records: int = 1024) -> int:
    """Copy the records of stores that were made alike into one, each key once; returns how many were copied.

    May be repeated after a kill. Raises ValueError where manifests differ, or two stores hold different bytes for one key.
    """
    stores = [FeatureStore(source) for source in sources]
    for store in stores[1:]:
        store.manifest.check(stores[0].manifest, store.path)
    merged = FeatureStore.create_or_open(output, stores[0].manifest)
    origin: dict[str, FeatureStore] = {key: merged for key in merged.keys}
    copied = 0
    with FeatureWriter(merged, shard_records=shard_records) as writer:
        for store in stores:
            for key in store.keys:
                first = origin.setdefault(key, store)
                if first is store:
                    writer.add({key: store.read(key)})
                    copied += 1
                elif not np.array_equal(first.read(key).view(np.uint16), store.read(key).view(np.uint16)):
                    raise ValueError(f"{first.path} and {store.path} hold different features for {key!r}")
    return copied


class NpyFolder:
    """A folder of `{id}.npy`, each (N, channels) of floats, as VTimeLLM and its descendants keep features.

    room  the part before the id in this engine's keys, such as `stage2`
    Reads as a FeatureStore does. Raises ValueError where the folder holds none, and for a file of another shape.
    """

    def __init__(self, path: Path, room: str) -> None:
        self.path = path
        self._files = {f"{room}/{file.stem}": file for file in sorted(path.glob("*.npy"))}
        if not self._files:
            raise ValueError(f"{path} holds no .npy file")
        first = next(iter(self._files))
        shape = self._load(first).shape
        if len(shape) != 2:
            raise ValueError(f"{self._files[first]} holds an array of shape {shape}, not (frames, channels)")
        self.tokens, self.channels = shape

    @property
    def keys(self) -> Sequence[str]:
        return tuple(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def read(self, key: str) -> np.ndarray:
        """The record (tokens, channels), in the file's own floating-point type."""
        record = self._load(key)
        if record.shape != (self.tokens, self.channels):
            raise ValueError(
                f"{self._files[key]} holds an array of shape {record.shape}, the others {self.tokens, self.channels}"
            )
        return record

    def _load(self, key: str) -> np.ndarray:
        try:
            record = np.load(self._files[key], allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{self._files[key]} is no readable .npy file ({error})") from None
        if not np.issubdtype(record.dtype, np.floating):
            raise ValueError(f"{self._files[key]} holds {record.dtype}, not floating-point numbers")
        return record


def import_npy(folder: NpyFolder, output: Path, manifest: Manifest, shard_records: int = 1024) -> int:
    """Copy a folder of `.npy` files into a store; returns how many were new. May be repeated after a kill.

    Raises ValueError for files of another shape than the manifest's, and for numbers that float16 cannot hold.
    """
    if (manifest.tokens, manifest.channels) != (folder.tokens, folder.channels):
        raise ValueError(
            f"{folder.path} holds records of {folder.tokens, folder.channels}, the store {output} is for "
            f"{manifest.tokens, manifest.channels}"
        )
    store = FeatureStore.create_or_open(output, manifest)
    new = [key for key in folder.keys if key not in store]
    with FeatureWriter(store, shard_records=shard_records) as writer:
        for key in new:
            writer.add({key: folder.read(key)})
    return len(new)


def _inspect(options: argparse.Namespace) -> int:
    store = FeatureStore(options.store)
    shards = sorted(options.store.glob("*.safetensors"))
    for name, value in asdict(store.manifest).items():
        print(f"{name:<14} {value}")
    print(f"{'records':<14} {len(store):,} in {len(list(options.store.glob('*.parquet'))):,} shards")
    print(f"{'size':<14} {sum(s.stat().st_size for s in shards) / 1e9:.3f} GB")
    for room, count in sorted(Counter(key.partition("/")[0] for key in store.keys).items()):
        print(f"  {room:<12} {count:,}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    report = verify(options.store)
    for line in _lines(report):
        print(line)
    if options.discard:
        for file in (*report.damage, *report.stray):
            file.unlink()
        if report.damage:
            print("the damaged shards are discarded; run engine.encode to make their records again")
    print(f"{report.records:,} records in {report.shards:,} shards read, {len(report.damage):,} shards damaged")
    return 1 if report.damage else 0


def _lines(report: Report) -> Iterator[str]:
    yield from report.damage.values()
    if report.repeated:
        yield f"{len(report.repeated):,} keys stand in more than one shard, {report.repeated[0]!r} among them"
    if report.stray:
        size = sum(p.stat().st_size for p in report.stray)
        yield f"{len(report.stray):,} files of {size / 1e6:.1f} MB, left by killed writers, belong to no shard"


def _merge(options: argparse.Namespace) -> int:
    copied = merge(options.output, options.stores, options.shard_records)
    print(f"{copied:,} records copied; {options.output} holds {len(FeatureStore(options.output)):,}")
    return 0


def _import(options: argparse.Namespace) -> int:
    folder = NpyFolder(options.folder, options.room)
    if options.like is not None:
        manifest = Manifest.load(options.like)
    else:
        manifest = Manifest(
            options.encoder, folder.tokens, options.sampling, options.preprocess, folder.tokens, folder.channels
        )
    copied = import_npy(folder, options.output, manifest, options.shard_records)
    print(f"{copied:,} records copied; {options.output} holds {len(FeatureStore(options.output)):,}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after damage or a one-sentence error."""
    parser = argparse.ArgumentParser("python -m dataloaders.store", description="Look after feature stores.")
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|merge|import")

    command = commands.add_parser("inspect", help="what a store was made of, and how much it holds")
    command.add_argument("store", type=Path)
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="compare every record with its checksum")
    command.add_argument("store", type=Path)
    command.add_argument(
        "--discard", action="store_true", help="remove damaged shards' indices and what killed writers left"
    )
    command.set_defaults(run=_verify)

    shards = argparse.ArgumentParser(add_help=False)
    shards.add_argument("--shard-records", type=int, default=1024, help="records per shard (default: 1024)")
    command = commands.add_parser("merge", parents=[shards], help="copy several stores into one, in full shards")
    command.add_argument("output", type=Path)
    command.add_argument("stores", type=Path, nargs="+", metavar="store")
    command.set_defaults(run=_merge)

    command = commands.add_parser("import", parents=[shards], help="copy a folder of {id}.npy, each (N, channels)")
    command.add_argument("folder", type=Path)
    command.add_argument("output", type=Path, help="store, such as FEATURES/videos")
    command.add_argument("--room", required=True, help="stage2, stage3, evaluation: where the ids belong")
    origin = command.add_mutually_exclusive_group(required=True)
    origin.add_argument("--encoder", help="what made the features, to be recorded")
    origin.add_argument("--like", type=Path, metavar="STORE", help="they were made as the features of this store were")
    command.add_argument("--sampling", default=_AS_PITE, help=f"rule that picked the frames (default: {_AS_PITE})")
    command.add_argument("--preprocess", default="imported", help="resize, crop and normalisation (default: imported)")
    command.set_defaults(run=_import)

    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        print(f"dataloaders.store: {error}", file=sys.stderr)
        return 1
