"""python -m dataloaders.store inspect|verify|merge|import: feature stores from the outside.

Opening a store compares sizes only; `verify` reads every byte. A damaged shard costs its own records and no others:
without its index it does not exist, and engine.encode makes what is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq

from dataloaders.files import abandoned
from dataloaders.formats import ROOMS, Room, iter_media
from dataloaders.ledger import LEDGER, Failure, Ledger, read_failures
from dataloaders.store import MANIFEST, FeatureStore, FeatureWriter, Manifest, lock, read_indices

_AS_PITE = "linspace truncated"
_RANK = re.compile(r"\.?(\d{5})[-.]")
"""How the files of a store begin that a rank writes: shards, their indices, what is not yet renamed, and locks."""


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    records, shards  that were read
    damage           a sentence for each damaged shard, by its index file
    repeated         keys that more than one shard holds; readers take the last
    stray            files without an index or a name, which killed writers left; together of `stray_bytes`
    """

    records: int
    shards: int
    damage: dict[Path, str]
    repeated: list[str]
    stray: list[Path]
    stray_bytes: int


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
    return Report(len(counts), len(whole), damage, repeated, stray, sum(map(_size, stray)))


def _size(file: Path) -> int:
    """Bytes, 0 for what a running writer has renamed meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def discard(path: Path) -> Report:
    """As `verify`, and remove what it found: the indices of damaged shards, and what killed writers left.

    Raises ValueError, nothing removed, while a process writes to the store: of its unfinished shard the name is taken and
    the index not yet written, as of one that a killed writer left. Of writers that begin meanwhile nothing is touched, nor,
    where there are no locks, what any process wrote within a day, unless it is of this machine and has ended.
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


def stores_in(path: Path) -> list[Path]:
    """The store at `path`, or those in it, as engine.encode fills a folder. Raises ValueError where there is none."""
    if (path / MANIFEST).exists():
        return [path]
    stores = [manifest.parent for manifest in sorted(path.glob(f"*/{MANIFEST}"))]
    if not stores:
        raise ValueError(f"{path} is no feature store and holds none: make one with engine.encode")
    return stores


def note_missing(folder: Path, output: Path, data: Path, room: str, budget: float) -> int:
    """Write down, in the ledger beside a store, the media of a data folder's room that neither it nor `folder` holds.

    folder  of the `.npy` files that were imported; a line names the one that is missing
    budget  share of the room's media that may be missing
    Returns how many are; those that the ledger names already are not written again. Raises ValueError, nothing written,
    for an unknown room and where more are missing than the budget allows.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"--failure-budget is a share between 0 and 1, not {budget}")
    name = room.partition("/")[0]
    if name not in ROOMS:
        raise ValueError(f"--room must begin with {', '.join(ROOMS)}, not {name!r}")
    # Records that name no media are training's to count.
    named = iter_media(data, [cast(Room, name)], lambda _: None)
    media = [m for m in named if m.key.rpartition("/")[0] == room]
    if not media:
        raise ValueError(f"{data} names no media whose keys begin with {room}/")
    store = FeatureStore(output)
    missing = [m.key for m in media if m.key not in store]
    if len(missing) > budget * len(media):
        raise ValueError(
            f"{len(missing):,} of {len(media):,} media of {room} have no file in {folder}, {missing[0]!r} among them, more "
            f"than the failure budget of {budget:.2%}; raise --failure-budget to train without them"
        )
    ledger = Ledger(output.parent / LEDGER, len(media), 1.0)
    known = {failure.id for failure in read_failures(ledger.path)}
    for key in missing:
        if key not in known:
            file = folder / f"{key.rpartition('/')[2]}.npy"
            ledger.add(Failure(key, str(file), "import", f"{file.name}: not among the imported files"))
    return len(missing)


def _inspect(options: argparse.Namespace) -> int:
    for path in stores_in(options.store):
        if path != options.store:
            print(path)
        store = FeatureStore(path)
        shards = sorted(path.glob("*.safetensors"))
        for name, value in asdict(store.manifest).items():
            print(f"{name:<14} {value}")
        print(f"{'records':<14} {len(store):,} in {len(list(path.glob('*.parquet'))):,} shards")
        print(f"{'size':<14} {sum(s.stat().st_size for s in shards) / 1e9:.3f} GB")
        for room, count in sorted(Counter(key.partition("/")[0] for key in store.keys).items()):
            print(f"  {room:<12} {count:,}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    damaged = 0
    for path in stores_in(options.store):
        report = discard(path) if options.discard else verify(path)
        for line in _lines(report):
            print(line)
        if options.discard and report.damage:
            print("the damaged shards are discarded; run engine.encode to make their records again")
        what = f"{report.records:,} records in {report.shards:,} shards read, {len(report.damage):,} shards damaged"
        print(what if path == options.store else f"{path}: {what}")
        damaged += len(report.damage)
    return 1 if damaged else 0


def _lines(report: Report) -> Iterator[str]:
    yield from report.damage.values()
    if report.repeated:
        yield f"{len(report.repeated):,} keys stand in more than one shard, {report.repeated[0]!r} among them"
    if report.stray:
        yield f"{len(report.stray):,} files of {report.stray_bytes / 1e6:.1f} MB, left by killed writers, belong to no shard"


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
    if options.data is not None:
        missing = note_missing(options.folder, options.output, options.data, options.room, options.failure_budget)
        where = (
            f"; training leaves them out, and `python -m dataloaders.ledger {options.output.parent}` lists them"
            if missing
            else ""
        )
        print(f"{missing:,} media of {options.data / options.room} have no features{where}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after damage or a one-sentence error."""
    parser = argparse.ArgumentParser("python -m dataloaders.store", description="Look after feature stores.")
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|merge|import")

    command = commands.add_parser("inspect", help="what a store was made of, and how much it holds")
    command.add_argument("store", type=Path, help="a store, or a folder of stores such as engine.encode fills")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="compare every record with its checksum")
    command.add_argument("store", type=Path, help="a store, or a folder of stores such as engine.encode fills")
    command.add_argument(
        "--discard",
        action="store_true",
        help="remove damaged shards' indices and what killed writers left; refused while a process writes",
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
    command.add_argument(
        "--data",
        type=Path,
        help="data folder whose media of this room are looked for; those without a file are written to the ledger beside "
        "OUTPUT, so that training leaves them out",
    )
    command.add_argument(
        "--failure-budget",
        type=float,
        default=0.01,
        help="with --data: share of the room's media that may have no file (default: %(default)s)",
    )
    command.set_defaults(run=_import)

    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        print(f"dataloaders.store: {error}", file=sys.stderr)
        return 1
