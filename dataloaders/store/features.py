"""Feature store: the features of a frozen encoder, computed once, in shards that are mapped into memory.

    STORE/manifest.json                  how the features were made; a store with another manifest is refused
    STORE/00000-000003.safetensors       one tensor `features` (n, tokens, channels) float16; rank and number in the
                                         name
    STORE/00000-000003.parquet           its keys, checksums and decoders, row by row; written last: a shard without it is
                                         ignored

Files are written under a temporary name, flushed and renamed, and never changed afterwards. A killed writer loses only
the records of its unfinished shard. A record of PiTe takes 153.6 kB, so a shard of 1024 records takes 157 MB.

`python -m dataloaders.store --help` inspects, verifies, merges and imports stores.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, KeysView, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from dataloaders import locks
from dataloaders.files import read_json_object, write_atomically
from dataloaders.store.layout import MANIFEST as MANIFEST

_TENSOR = "features"
REMAKE = "encode into another folder (--store), or remove this one"
"""Remedy for a store that engine.encode made with other settings."""

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_MAPPED_SHARDS = 32
"""Shards that stay mapped per store. Each uses a file descriptor; a stage has more shards than a process may open."""

_OPENING_THREADS = 8
"""Indices read in parallel: over a network each takes some round trips, and a million records have a thousand."""


@dataclass(frozen=True)
class Manifest:
    """How a store's features were made. A store whose manifest differs from the expected one is refused.

    encoder     checksum of the encoder's weights
    num_frames  frames encoded per video; 1 for still images
    sampling    frame sampling rule
    preprocess  resize, crop and normalisation
    tokens, channels  shape of a record
    dtype, compute_dtype  of the stored features, and of the encoder's arithmetic: bfloat16 and float32 features differ
    extractor   what the encoder gives: an image embedding for each frame, or pooled patches, of which a record has more rows
                than frames. The file has this field where it is not the first
    """

    encoder: str
    num_frames: int
    sampling: str
    preprocess: str
    tokens: int
    channels: int
    dtype: str = "float16"
    compute_dtype: str = "float32"
    extractor: str = "image_embeds"

    @staticmethod
    def load(path: Path) -> Manifest:
        """The manifest of the store at `path`. Raises ValueError, naming file and field, if it cannot be one."""
        file = path / MANIFEST
        if not file.exists():
            raise ValueError(f"{path} is no feature store: it holds no {MANIFEST}; make one with engine.encode")
        values = read_json_object(file)
        values = {"extractor": Manifest.extractor, **values}
        for f in fields(Manifest):
            if f.name not in values:
                raise ValueError(
                    f"{file} has no field {f.name!r}: it is damaged, or of an earlier version; encode into another "
                    "folder, or remove this one"
                )
        manifest = Manifest(**{f.name: values[f.name] for f in fields(Manifest)})
        if fault := next(manifest._faults(), None):
            raise ValueError(f"{file}: {fault}; it is damaged: encode into another folder, or fetch this one again")
        return manifest

    def _faults(self) -> Iterator[str]:
        """A sentence for each field whose value no writer of stores gives it."""
        for name, value in asdict(self).items():
            if name in ("num_frames", "tokens", "channels"):
                if type(value) is not int or value < 1:
                    yield f"field {name!r} must be a whole number of at least 1, not {value!r}"
            elif not isinstance(value, str) or not value:
                yield f"field {name!r} must be a text, not {value!r}"
        for name, known in (("dtype", ("float16",)), ("compute_dtype", COMPUTE_DTYPES)):
            if getattr(self, name) not in known:
                yield f"field {name!r} must be {' or '.join(known)}, not {getattr(self, name)!r}"
        if self.tokens != self.num_frames and self.extractor == Manifest.extractor:
            yield (
                f"field 'tokens' is {self.tokens}, but 'num_frames' {self.num_frames}, and a record has one token for "
                "each frame"
            )

    def as_dict(self) -> dict[str, Any]:
        """The fields of the file."""
        values = asdict(self)
        if self.extractor == Manifest.extractor:
            del values["extractor"]
        return values

    def check(self, wanted: Manifest, path: Path, remedy: str = REMAKE) -> None:
        """Raise ValueError with the first field in which the manifest of the store at `path` differs from `wanted`.

        remedy  the end of the message
        """
        for f in fields(Manifest):
            stored, expected = getattr(self, f.name), getattr(wanted, f.name)
            if stored != expected:
                raise ValueError(
                    f"the feature store {path} was made with {f.name} {stored!r}, but {expected!r} is expected; {remedy}"
                )


class FeatureStore:
    """Features by key, read from mapped shards. Opening reads only the indices; a shard is mapped on its first read.

    Raises ValueError if `path` is no store, or if the size of a shard does not match its index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.load(path)
        self._shards: list[tuple[Path, int]] = []  # (file, where its tensor begins)
        self._ends: list[int] = []
        self._rows: dict[str, int] = {}
        for index, (keys, start, damage) in read_indices(path, self.manifest).items():
            if damage is not None:
                raise ValueError(f"{damage}; run engine.encode again to make its records anew")
            self._shards.append((index.with_suffix(".safetensors"), start))
            first = self._ends[-1] if self._ends else 0
            self._ends.append(first + len(keys))
            self._rows.update(zip(keys, range(first, self._ends[-1])))
        self._record_bytes = 2 * self.manifest.tokens * self.manifest.channels
        self._mapped = lru_cache(_MAPPED_SHARDS)(self._map)

    @staticmethod
    def create_or_open(path: Path, manifest: Manifest, remedy: str = REMAKE) -> FeatureStore:
        """Open a store to extend it, or create an empty one.

        Removes the index of a damaged shard, so that its records are made again. Raises ValueError if the store was
        made with another encoder, sampling or preprocessing; the message ends with `remedy`.
        """
        if (path / MANIFEST).exists():
            Manifest.load(path).check(manifest, path, remedy)
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / MANIFEST, json.dumps(manifest.as_dict(), indent=1) + "\n")
        for index, (_, _, damage) in read_indices(path, manifest).items():
            if damage is not None:
                # Another rank may have removed it already.
                index.unlink(missing_ok=True)
        return FeatureStore(path)

    @staticmethod
    def stored_keys(path: Path) -> set[str]:
        """The keys of the undamaged shards at `path`, whatever its manifest; none if it is no store yet."""
        if not (path / MANIFEST).exists():
            return set()
        indices = read_indices(path, Manifest.load(path)).values()
        return {key for index in indices if index.damage is None for key in index.keys}

    @property
    def keys(self) -> KeysView[str]:
        return self._rows.keys()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def read(self, key: str) -> np.ndarray:
        """The record (tokens, channels) float16: a read-only view of the mapped file. Raises ValueError if absent."""
        shard, row = self._place(key)
        self._advise(shard, row)
        return self._mapped(shard)[1][row]

    def fingerprint(self, keys: Iterable[str]) -> str:
        """A short checksum of the contents of records, from their stored checksums. It does not depend on the shards.

        Raises ValueError for a key that is absent.
        """
        of_shard = lru_cache(None)(self._checksums)
        contents = hashlib.sha256()
        for key in sorted(set(keys)):
            shard, row = self._place(key)
            contents.update(f"{key} {of_shard(shard)[row]}\n".encode())
        return contents.hexdigest()[:16]

    def _checksums(self, shard: int) -> list[int]:
        index = self._shards[shard][0].with_suffix(".parquet")
        return cast("list[int]", pq.read_table(index, columns=["crc32"])["crc32"].to_pylist())

    def decoders(self) -> dict[str, str]:
        """Key -> the decoder that gave a record's frames, and after a fallback the reason; empty where none is stored."""
        found: dict[str, str] = {}
        for file, _ in self._shards:
            table = pq.read_table(file.with_suffix(".parquet"))
            keys = table["key"].to_pylist()
            found |= zip(keys, table["decoder"].to_pylist() if "decoder" in table.column_names else [""] * len(keys))
        return found

    def advise(self, keys: Iterable[str]) -> None:
        """Prefetch records that will be read next (madvise), all in parallel.

        Without it, random records of a mapped file are read page by page: 0.13 GB/s from a disk that reaches 2.8 GB/s.
        """
        for key in keys:
            self._advise(*self._place(key))

    def _advise(self, shard: int, row: int) -> None:
        begin = self._shards[shard][1] + row * self._record_bytes
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapped(shard)[0].madvise(mmap.MADV_WILLNEED, page, begin + self._record_bytes - page)

    def _place(self, key: str) -> tuple[int, int]:
        """The index of a record's shard, and its row in it."""
        try:
            row = self._rows[key]
        except KeyError:
            raise ValueError(
                f"the feature store {self.path} holds no features for {key!r}; run engine.encode"
            ) from None
        shard = bisect_right(self._ends, row)
        return shard, row - (self._ends[shard - 1] if shard else 0)

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        """A shard's mapping, and its records (n, tokens, channels) float16."""
        file, start = self._shards[shard]
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        values = np.frombuffer(mapped, np.float16, offset=start)
        return mapped, values.reshape(-1, self.manifest.tokens, self.manifest.channels)


class NonFiniteError(ValueError):
    """Features that are not finite in half precision. The message contains the record."""


class FeatureWriter:
    """Appends records to a store under a rank's name. Leaving the context writes the last shard.

    A lock prevents two processes from writing as the same rank. On network file systems without locks two writers still
    get different shards, because a shard's name is reserved by creating the file.

    shard_records  records per shard: the most that a kill can lose
    Raises ValueError while another process writes as the same rank.
    """

    def __init__(self, store: FeatureStore, rank: int = 0, shard_records: int = 1024) -> None:
        self.path, self.manifest, self.rank, self.shard_records = store.path, store.manifest, rank, shard_records
        self._records: dict[str, np.ndarray] = {}
        self._decoders: dict[str, str] = {}
        self._lock = lock(self.path, rank)
        taken = [int(p.stem.partition("-")[2]) for p in self.path.glob(f"{rank:05d}-*.[sp]*")]
        self._number = max(taken, default=-1) + 1

    def add(self, records: Mapping[str, np.ndarray], decoder: str = "") -> None:
        """Append records (tokens, channels); they stay in memory until a shard is full. Raises NonFiniteError.

        decoder  that gave their frames, such as "DALI (h264)"
        """
        for key, record in records.items():
            assert record.shape == (self.manifest.tokens, self.manifest.channels)
            with np.errstate(over="ignore"):
                half = record.astype(np.float16)
            if not np.isfinite(half).all():
                raise NonFiniteError(f"features of {key!r} are not finite in half precision")
            self._records[key], self._decoders[key] = half, decoder
        if len(self._records) >= self.shard_records:
            self.flush()

    def flush(self) -> None:
        """Write the records in memory as a shard, then its index."""
        if not self._records:
            return
        shard = self._reserve_name()
        records = list(self._records.values())
        write_atomically(shard, save({_TENSOR: np.stack(records)}))
        checksums = pa.array([zlib.crc32(record.tobytes()) for record in records], pa.uint32())
        sink = pa.BufferOutputStream()
        columns = {"key": list(self._records), "crc32": checksums, "decoder": list(self._decoders.values())}
        # All keys differ, so a dictionary of them would only make opening slower.
        pq.write_table(pa.table(columns), sink, use_dictionary=["decoder"])
        write_atomically(shard.with_suffix(".parquet"), sink.getvalue().to_pybytes())
        self._records.clear()
        self._decoders.clear()

    def _reserve_name(self) -> Path:
        """Reserve a shard's name by exclusive creation, which works on network file systems too."""
        while True:
            shard = self.path / f"{self.rank:05d}-{self._number:06d}.safetensors"
            self._number += 1
            try:
                os.close(os.open(shard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                return shard
            except FileExistsError:
                continue

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self._lock.close()


def lock(path: Path, rank: int) -> locks.Lock:
    """Acquire the lock for writing to a store as a rank, until it is closed.

    Raises ValueError if another process holds it.
    """
    try:
        return locks.lock(path / f".{rank:05d}.lock", "a second process that writes as the same rank is not refused")
    except BlockingIOError:
        raise ValueError(f"another process is writing to {path} as rank {rank}; wait for it or stop it") from None


class Index(NamedTuple):
    """A shard's keys and the offset of its tensor; `damage` is the reason if it cannot be used."""

    keys: list[str]
    start: int
    damage: str | None = None


def read_indices(path: Path, manifest: Manifest) -> dict[Path, Index]:
    """The index files of a store, in order, with their contents; checks that each shard has the right size."""
    files = sorted(path.glob("*.parquet"))
    # The threads only read files; parsing in them would be slower, since it holds Python's lock.
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        contents = pool.map(_content, files)
        return {file: _parse_index(file, *content, manifest) for file, content in zip(files, contents)}


def _content(index: Path) -> tuple[bytes | OSError, tuple[int, int] | None]:
    """An index file's bytes; its shard's size and the offset of the tensor, or None without a complete header."""
    shard = index.with_suffix(".safetensors")
    try:
        extent = shard.stat().st_size, _data_start(shard)
    except (OSError, struct.error):
        extent = None
    try:
        return index.read_bytes(), extent
    except OSError as error:
        return error, extent


def _parse_index(index: Path, content: bytes | OSError, extent: tuple[int, int] | None, manifest: Manifest) -> Index:
    shard = index.with_suffix(".safetensors")
    try:
        if isinstance(content, OSError):
            raise content
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            keys = file.read(["key"], use_threads=False)["key"].to_pylist()
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        return Index([], 0, f"the index {index} is damaged ({error})")
    if extent is None:
        return Index([], 0, f"the shard {shard} is missing or empty")
    size, start = extent
    needed = start + len(keys) * manifest.tokens * manifest.channels * 2
    return Index(keys, start, None if size == needed else f"the shard {shard} holds {size} bytes instead of {needed}")


def _data_start(shard: Path) -> int:
    """Offset of the tensor: after the header's length (8 bytes, little-endian) and the header (safetensors)."""
    with shard.open("rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]
