"""python -m dataloaders.store inspect|verify|merge|import|failures: the command line of feature stores."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dataloaders.failures import LEDGER, read_failures, report
from dataloaders.store.features import MANIFEST, FeatureStore, Manifest
from dataloaders.store.tools import (
    PITE_SAMPLING,
    NpyFolder,
    Report,
    check_import,
    discard,
    import_npy,
    log_missing,
    merge,
    stores_in,
    verify,
)


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
        for split, count in sorted(Counter(key.partition("/")[0] for key in store.keys).items()):
            print(f"  {split:<12} {count:,}")
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
        yield f"{len(report.repeated):,} keys are in more than one shard, such as {report.repeated[0]!r}"
    if report.stray:
        size = f"{report.stray_bytes / 1e6:.1f} MB"
        yield f"{len(report.stray):,} files of {size}, left by killed writers, belong to no shard"


def _merge(options: argparse.Namespace) -> int:
    copied = merge(options.output, options.stores, options.shard_records)
    print(f"{copied:,} records copied; {options.output} holds {len(FeatureStore(options.output)):,}")
    return 0


def _import(options: argparse.Namespace) -> int:
    check_import(options.data, options.split, options.failure_budget)
    folder = NpyFolder(options.folder, options.split)
    if options.like is not None:
        manifest = Manifest.load(options.like)
    else:
        manifest = Manifest(
            options.encoder, folder.tokens, options.sampling, options.preprocess, folder.tokens, folder.channels
        )
    copied = import_npy(folder, options.output, manifest, options.shard_records)
    print(f"{copied:,} records copied; {options.output} holds {len(FeatureStore(options.output)):,}")
    if options.data is not None:
        missing = log_missing(options.folder, options.output, options.data, options.split, options.failure_budget)
        where = (
            f"; training leaves them out, and `python -m dataloaders.store failures {options.output.parent}` lists them"
            if missing
            else ""
        )
        print(f"{missing:,} media of {options.data / options.split} have no features{where}")
    return 0


def _failures(options: argparse.Namespace) -> int:
    folder: Path = options.features
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of features")
    stores = [FeatureStore(manifest.parent) for manifest in sorted(folder.glob(f"*/{MANIFEST}"))]
    print(report(read_failures(folder / LEDGER), {key for store in stores for key in store.keys}))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 1 after damage or a one-sentence error."""
    parser = argparse.ArgumentParser(
        "python -m dataloaders.store", description="Inspect, verify, merge and import feature stores."
    )
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|merge|import|failures")

    command = commands.add_parser("inspect", help="the settings that a store was made with, and its size")
    command.add_argument("store", type=Path, help="a store, or a folder of stores such as engine.encode fills")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="compare every record with its checksum")
    command.add_argument("store", type=Path, help="a store, or a folder of stores such as engine.encode fills")
    command.add_argument(
        "--discard",
        action="store_true",
        help="remove damaged shards' indices and files of killed writers; refused while a process writes",
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
    command.add_argument("--split", required=True, help="split of the ids: stage2, stage3 or evaluation")
    origin = command.add_mutually_exclusive_group(required=True)
    origin.add_argument("--encoder", help="name of the encoder, for the manifest")
    origin.add_argument("--like", type=Path, metavar="STORE", help="take the manifest of this store")
    command.add_argument("--sampling", default=PITE_SAMPLING, help=f"frame sampling rule (default: {PITE_SAMPLING})")
    command.add_argument("--preprocess", default="imported", help="resize, crop and normalisation (default: imported)")
    command.add_argument(
        "--data",
        type=Path,
        help="data folder; media of this split without a file are logged in the ledger next to OUTPUT, "
        "and training leaves them out",
    )
    command.add_argument(
        "--failure-budget",
        type=float,
        default=0.01,
        help="with --data: share of the split's media that may have no file (default: %(default)s)",
    )
    command.set_defaults(run=_import)

    command = commands.add_parser("failures", help="media that failed to decode or encode, by reason")
    command.add_argument("features", type=Path, metavar="FEATURES", help="a folder of stores that engine.encode filled")
    command.set_defaults(run=_failures)

    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        print(f"dataloaders.store: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
