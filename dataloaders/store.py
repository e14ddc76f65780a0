"""Feature store: what a frozen encoder saw, once, in shards that are mapped rather than read.

    STORE/manifest.json                  what made the features; a store made otherwise is refused
    STORE/00000-000003.safetensors       one tensor `features` (n, tokens, channels) float16; rank and number in the name
    STORE/00000-000003.parquet           its keys, row by row; written last, so a shard without one does not exist

Files are written beside, flushed and renamed, and never changed afterwards. A killed writer loses the records of its
unfinished shard, nothing else. One record of PiTe's is 153.6 kB, so a shard of 1024 is 157 MB.
"""

from __future__ import annotations

import fcntl
import json
import struct
from bisect import bisect_right
from collections.abc import KeysView, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from dataloaders.files import write_atomically

MANIFEST = "manifest.json"
_TENSOR = "features"
_MAPPED_SHARDS = 32
"""Shards kept mapped per store. Each holds a file descriptor, and a stage has more shards than a process may open."""


@dataclass(frozen=True)
class Manifest:
    """What made a store's features; a store whose manifest differs from the one asked for is refused.

    encoder     checksum of the encoder's weights
    num_frames  frames encoded per video; 1 for still images
    sampling    rule that picked them
    preprocess  resize, crop and normalisation
    tokens, channels  shape of a record
    dtype, compute_dtype  of what is stored, and of the encoder's own arithmetic: bfloat16 and float32 features differ
    """

    encoder: str
    num_frames: int
    sampling: str
    preprocess: str
    tokens: int
    channels: int
    dtype: str = "float16"
    compute_dtype: str = "float32"

    @staticmethod
    def load(path: Path) -> Manifest:
        try:
            values = json.loads((path / MANIFEST).read_text())
            return Manifest(**{f.name: values[f.name] for f in fields(Manifest)})
        except FileNotFoundError:
            raise ValueError(
                f"{path} is no feature store: it holds no {MANIFEST}; make one with engine.encode"
            ) from None
        except KeyError as error:
            raise ValueError(
                f"{path / MANIFEST} says nothing of {error}: it is damaged, or of an earlier version; encode into another "
                "folder, or remove this one"
            ) from None
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path / MANIFEST} is damaged: {error!r}") from None

    def check(self, wanted: Manifest, path: Path) -> None:
        """Raise ValueError naming the first field in which a store at `path` differs from what is wanted."""
        for f in fields(Manifest):
            stored, asked = getattr(self, f.name), getattr(wanted, f.name)
            if stored != asked:
                raise ValueError(
                    f"the feature store {path} was made with {f.name} {stored!r}, but {asked!r} is asked for; "
                    "encode into another folder, or remove this one"
                )


class FeatureStore:
    """Features by key, read from mapped shards. Opening reads the indices only; a shard is mapped when it is read.

    Raises ValueError where `path` is no store, or holds a shard that is shorter than its index says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.load(path)
        self._shards: list[tuple[Path, int]] = []  # (file, where its tensor begins)
        self._ends: list[int] = []
        self._rows: dict[str, int] = {}
        for index in sorted(path.glob("*.parquet")):
            keys, start, damage = _read_index(index, self.manifest)
            if damage is not None:
                raise ValueError(f"{damage}; run engine.encode again to make its records anew")
            self._shards.append((index.with_suffix(".safetensors"), start))
            first = self._ends[-1] if self._ends else 0
            self._ends.append(first + len(keys))
            self._rows.update(zip(keys, range(first, self._ends[-1])))
        self._mapped = lru_cache(_MAPPED_SHARDS)(self._map)

    @staticmethod
    def create_or_open(path: Path, manifest: Manifest) -> FeatureStore:
        """Open a store to extend it, or begin an empty one.

        A damaged shard loses its index here, so that its records are made again. Raises ValueError where the store was
        made by another encoder, sampling or preprocessing.
        """
        if (path / MANIFEST).exists():
            Manifest.load(path).check(manifest, path)
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
        for index in path.glob("*.parquet"):
            if _read_index(index, manifest).damage is not None:
                # Another rank may have been here first.
                index.unlink(missing_ok=True)
        return FeatureStore(path)

    @property
    def keys(self) -> KeysView[str]:
        return self._rows.keys()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def read(self, key: str) -> np.ndarray:
        """The record (tokens, channels) float16: a read-only view of the mapped file. Raises ValueError if absent."""
        try:
            row = self._rows[key]
        except KeyError:
            raise ValueError(f"the feature store {self.path} holds nothing for {key!r}; run engine.encode") from None
        shard = bisect_right(self._ends, row)
        return self._mapped(shard)[row - self._ends[shard]]

    def _map(self, shard: int) -> np.ndarray:
        file, start = self._shards[shard]
        records = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
        return np.memmap(file, np.float16, "r", start, (records, self.manifest.tokens, self.manifest.channels))


class NonFiniteError(ValueError):
    """Features that half precision cannot hold; the message names the record."""


class FeatureWriter:
    """Appends records to a store under one rank's name; a context manager that writes the last shard at its end.

    shard_records  records per shard: what a kill can cost
    Raises ValueError while another process writes under the same rank.
    """

    def __init__(self, store: FeatureStore, rank: int = 0, shard_records: int = 1024) -> None:
        self.path, self.manifest, self.rank, self.shard_records = store.path, store.manifest, rank, shard_records
        self._records: dict[str, np.ndarray] = {}
        # The kernel drops the lock with the process, however it ends.
        self._lock = (self.path / f".{rank:05d}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(
                f"another process is writing to {self.path} as rank {rank}; wait for it or stop it"
            ) from None
        written = [int(p.stem.partition("-")[2]) for p in self.path.glob(f"{rank:05d}-*.parquet")]
        self._number = max(written, default=-1) + 1

    def add(self, records: Mapping[str, np.ndarray]) -> None:
        """Append records (tokens, channels), kept in memory until a shard is full. Raises NonFiniteError."""
        for key, record in records.items():
            assert record.shape == (self.manifest.tokens, self.manifest.channels)
            with np.errstate(over="ignore"):
                half = record.astype(np.float16)
            if not np.isfinite(half).all():
                raise NonFiniteError(f"features of {key!r} are not finite in half precision")
            self._records[key] = half
        if len(self._records) >= self.shard_records:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory as a shard, then its index."""
        if not self._records:
            return
        shard = self.path / f"{self.rank:05d}-{self._number:06d}.safetensors"
        write_atomically(shard, save({_TENSOR: np.stack(list(self._records.values()))}))
        sink = pa.BufferOutputStream()
        # Keys are all different: a dictionary would only slow the opening.
        pq.write_table(pa.table({"key": list(self._records)}), sink, use_dictionary=False)
        write_atomically(shard.with_suffix(".parquet"), sink.getvalue().to_pybytes())
        self._number += 1
        self._records.clear()

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self._lock.close()


def _data_start(shard: Path) -> int:
    """Where the one tensor begins: after the header's length (8 bytes, little-endian) and the header (safetensors)."""
    with shard.open("rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


class _Index(NamedTuple):
    """A shard's keys and where its tensor begins; or why it cannot be used."""

    keys: list[str]
    start: int
    damage: str | None = None


def _read_index(index: Path, manifest: Manifest) -> _Index:
    """Read a shard's index, and see whether the shard is as long as its records."""
    shard = index.with_suffix(".safetensors")
    try:
        with pq.ParquetFile(index) as file:
            keys = file.read()["key"].to_pylist()
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        return _Index([], 0, f"the index {index} is damaged ({error})")
    try:
        size, start = shard.stat().st_size, _data_start(shard)
        needed = start + len(keys) * manifest.tokens * manifest.channels * 2
    except (OSError, struct.error):
        return _Index([], 0, f"the shard {shard} is missing or empty")
    return _Index(keys, start, None if size == needed else f"the shard {shard} holds {size} bytes instead of {needed}")
