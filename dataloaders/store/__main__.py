"""python -m dataloaders.store inspect|verify|merge|import|failures: the command line of feature stores."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataloaders import logs, paths
from dataloaders.cli import at_least, flag, parse_command, run
from dataloaders.failures import LEDGER, read_failures, report
from dataloaders.logs import LogFlags
from dataloaders.store.features import MANIFEST, FeatureStore, Manifest
from dataloaders.store.imports import FeatureFolder, check_import, import_features, log_missing
from dataloaders.store.tools import PITE_SAMPLING, Report, discard, merge, stores_in, verify


@dataclass(frozen=True, kw_only=True)
class InspectFlags(LogFlags):
    """The settings that a store was made with, and its size."""

    store: Path = flag(positional=True)
    """a store, or a folder of stores such as engine.encode fills"""


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(LogFlags):
    """Compare every record with its checksum."""

    store: Path = flag(positional=True)
    """a store, or a folder of stores such as engine.encode fills"""
    discard: bool = False
    """remove damaged shards' indices and files of killed writers; refused while a process writes"""


@dataclass(frozen=True, kw_only=True)
class ShardFlags(LogFlags):
    """The flag of the commands that write a store."""

    shard_records: int = 1024
    """records per shard"""

    def __post_init__(self) -> None:
        at_least(self, 1, "shard_records")


@dataclass(frozen=True, kw_only=True)
class MergeFlags(ShardFlags):
    """Copy several stores into one, in full shards."""

    output: Path = flag(positional=True)
    """the store to write or to extend"""
    stores: tuple[Path, ...] = flag(positional=True)
    """the stores to copy"""


@dataclass(frozen=True, kw_only=True)
class ImportFlags(ShardFlags):
    """Copy a folder of {id}.npy or {id}.pt, each (N, channels), into a store."""

    folder: Path = flag(positional=True)
    """folder of {id}.npy or {id}.pt"""
    output: Path = flag(positional=True)
    """store: FEATURES/{split}, so that engine.encode fills FEATURES/videos for the other splits"""
    split: str
    """split of the ids: stage2, stage3 or evaluation"""
    encoder: str | None = None
    """name of the encoder, for the manifest; or give --like"""
    like: Path | None = None
    """take the manifest of this store; or give --encoder"""
    sampling: str = PITE_SAMPLING
    """frame sampling rule"""
    num_frames: int | None = None
    """rows to take of each file, by the frame sampling rule; all unless given"""
    preprocess: str = "imported"
    """resize, crop and normalisation"""
    data: Path | None = None
    """data folder; media of this split without a file are logged in the ledger next to OUTPUT, and training leaves them
    out"""
    failure_budget: float = 0.01
    """share of the files that may be unreadable, and with --data of the split's media that may have no file"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_frames")
        if (self.encoder is None) == (self.like is None):
            raise ValueError("import needs one of --encoder and --like: where the manifest's settings come from")


@dataclass(frozen=True, kw_only=True)
class FailuresFlags(LogFlags):
    """Media that failed to decode or encode, by reason."""

    features: Path = flag(positional=True)
    """a folder of stores that engine.encode filled"""


def _inspect(flags: InspectFlags) -> int:
    for path in stores_in(flags.store):
        if path != flags.store:
            print(path)
        store = FeatureStore(path)
        shards = sorted(path.glob("*.safetensors"))
        for name, value in asdict(store.manifest).items():
            print(f"{name:<14} {value}")
        print(f"{'records':<14} {len(store):,} in {len(list(path.glob('*.parquet'))):,} shards")
        print(f"{'size':<14} {sum(s.stat().st_size for s in shards) / 1e9:.3f} GB")
        for split, count in sorted(Counter(key.partition("/")[0] for key in store.keys).items()):
            print(f"  {split:<12} {count:,}")
        for decoder, count in Counter(filter(None, store.decoders().values())).most_common():
            print(f"  decoded by {decoder}: {count:,}")
    return 0


def _verify(flags: VerifyFlags) -> int:
    damaged = 0
    for path in stores_in(flags.store):
        report = discard(path) if flags.discard else verify(path)
        for line in _lines(report):
            print(line)
        if flags.discard and report.damage:
            print("the damaged shards are discarded; run engine.encode to make their records again")
        what = f"{report.records:,} records in {report.shards:,} shards read, {len(report.damage):,} shards damaged"
        print(what if path == flags.store else f"{path}: {what}")
        damaged += len(report.damage)
    return 1 if damaged else 0


def _lines(report: Report) -> Iterator[str]:
    yield from report.damage.values()
    if report.repeated:
        yield f"{len(report.repeated):,} keys are in more than one shard, such as {report.repeated[0]!r}"
    if report.stray:
        size = f"{report.stray_bytes / 1e6:.1f} MB"
        yield f"{len(report.stray):,} files of {size}, left by killed writers, belong to no shard"


def _merge(flags: MergeFlags) -> int:
    copied = merge(flags.output, flags.stores, flags.shard_records)
    print(f"{copied:,} records copied; {flags.output} holds {len(FeatureStore(flags.output)):,}")
    return 0


def _import(flags: ImportFlags) -> int:
    paths.input_folder("FOLDER", flags.folder)
    check_import(flags.data, flags.split, flags.failure_budget)
    manifest = None if flags.like is None else Manifest.load(flags.like)
    folder = FeatureFolder(flags.folder, flags.split, flags.num_frames)
    if manifest is None:
        assert flags.encoder is not None, "ImportFlags requires one of the two"
        manifest = Manifest(
            flags.encoder, folder.tokens, flags.sampling, flags.preprocess, folder.tokens, folder.channels
        )
    imported = import_features(folder, flags.output, manifest, flags.shard_records, flags.failure_budget)
    print(f"{imported.copied:,} records copied; {flags.output} holds {len(FeatureStore(flags.output)):,}")
    if imported.failures:
        print(f"{len(imported.failures):,} files could not be imported, the first: {imported.failures[0].reason}")
    if flags.data is not None:
        missing = log_missing(flags.folder, flags.output, flags.data, flags.split, flags.failure_budget)
        where = (
            f"; training leaves them out, and `python -m dataloaders.store failures {flags.output.parent}` lists them"
            if missing
            else ""
        )
        print(f"{missing:,} media of {flags.data / flags.split} have no features{where}")
    return 0


def _failures(flags: FailuresFlags) -> int:
    folder = flags.features
    paths.input_folder("FEATURES", folder)
    if (folder / MANIFEST).exists():
        folder = folder.resolve().parent  # one of the stores: the log is next to it
    failures = list(read_failures(folder / LEDGER))
    # A run that stopped before its first record leaves a log and no store.
    stores = [FeatureStore(store) for store in (stores_in(folder, none_is_error=not failures))]
    print(report(failures, {key for store in stores for key in store.keys}))
    return 0


COMMANDS: dict[str, tuple[type[LogFlags], Callable[[Any], int]]] = {
    "inspect": (InspectFlags, _inspect),
    "verify": (VerifyFlags, _verify),
    "merge": (MergeFlags, _merge),
    "import": (ImportFlags, _import),
    "failures": (FailuresFlags, _failures),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 1 after damage or a one-sentence error, 2 for a wrong flag."""
    about = "Inspect, verify, merge and import feature stores."
    flags = parse_command(
        {name: cls for name, (cls, _) in COMMANDS.items()}, arguments, "python -m dataloaders.store", about
    )
    logs.configure(flags.log_level)
    (command,) = (function for cls, function in COMMANDS.values() if type(flags) is cls)
    return run("dataloaders.store", lambda: command(flags))


if __name__ == "__main__":
    sys.exit(main())
