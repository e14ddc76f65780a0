"""The feature store: round trips, refused manifests, and no loss of good records after kills and torn shards."""

from __future__ import annotations

import gc
import json
import mmap
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest, NonFiniteError

MANIFEST = Manifest("abc", num_frames=3, sampling="linspace", preprocess="224", tokens=3, channels=4)


def record(key: str) -> np.ndarray:
    seed = int.from_bytes(key.encode(), "little") % 2**32
    return np.random.default_rng(seed).random((3, 4), dtype=np.float32)


def write(path: Path, keys: list[str], rank: int = 0, shard_records: int = 4) -> None:
    with FeatureWriter(FeatureStore.create_or_open(path, MANIFEST), rank, shard_records) as writer:
        for key in keys:
            writer.add({key: record(key)})


def check(path: Path, keys: list[str]) -> FeatureStore:
    store = FeatureStore(path)
    assert sorted(store.keys) == sorted(keys) and len(store) == len(keys)
    for key in keys:
        assert key in store
        stored = store.read(key)
        assert stored.dtype == np.float16 and np.array_equal(stored, record(key).astype(np.float16))
    return store


KEYS = [f"stage2/v{i}" for i in range(11)]


def test_round_trip_over_shards(tmp_path: Path) -> None:
    write(tmp_path, KEYS)
    check(tmp_path, KEYS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    write(tmp_path, KEYS[:4])
    (shard,) = tmp_path.glob("*.safetensors")
    assert np.array_equal(load_file(shard)["features"], np.stack([record(k) for k in KEYS[:4]]).astype(np.float16))


def test_reading_maps_the_file(tmp_path: Path) -> None:
    write(tmp_path, KEYS)
    record = FeatureStore(tmp_path).read(KEYS[0])
    assert not record.flags.writeable
    base = record
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def test_shards_are_not_limited_by_open_files(tmp_path: Path) -> None:
    """2,000 shards can be read, twice and with records kept, by a process that may open 256 files."""
    keys = [f"k{i}" for i in range(2000)]
    write(tmp_path, keys[:1])
    shard, index = tmp_path / "00000-000000.safetensors", pq.ParquetFile(tmp_path / "00000-000000.parquet")
    content = bytearray(shard.read_bytes())
    for i, key in enumerate(keys[1:], 1):
        content[-24:] = record(key).astype(np.float16).tobytes()
        shard.with_name(f"00000-{i:06d}.safetensors").write_bytes(content)
        table = pa.table({"key": [key], "crc32": [0], "decoder": [""]}, index.schema_arrow)
        pq.write_table(table, tmp_path / f"00000-{i:06d}.parquet")
    code = (
        "import resource, sys, pathlib; from dataloaders.store.features import FeatureStore; "
        "from tests.dataloaders.store.test_store import record; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); store = FeatureStore(pathlib.Path(sys.argv[1])); "
        "kept = [store.read(f'k{i}') for i in range(100)]; "
        "same = [(store.read(k) == record(k).astype('float16')).all() for k in [*store.keys, *store.keys]]; "
        "print(len(same), all(same), (kept[7] == record('k7').astype('float16')).all())"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout == "4000 True True\n", run.stderr


def test_appending_and_many_ranks(tmp_path: Path) -> None:
    write(tmp_path, KEYS[:3])
    write(tmp_path, KEYS[3:6], rank=1)
    write(tmp_path, KEYS[6:])
    check(tmp_path, KEYS)
    assert {p.name[:5] for p in tmp_path.glob("*.parquet")} == {"00000", "00001"}


def test_the_fingerprint_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "a", KEYS)
    write(tmp_path / "b", KEYS[6:], rank=1, shard_records=2)
    write(tmp_path / "b", [*KEYS[:6], "another"], shard_records=3)
    one, two = (FeatureStore(tmp_path / name) for name in "ab")
    assert one.fingerprint(KEYS) == two.fingerprint([*KEYS, KEYS[0]]) != one.fingerprint(KEYS[1:])
    with FeatureWriter(FeatureStore.create_or_open(tmp_path / "c", MANIFEST)) as writer:
        writer.add({key: record("another" if key == KEYS[3] else key) for key in KEYS})
    assert FeatureStore(tmp_path / "c").fingerprint(KEYS) != one.fingerprint(KEYS)
    with pytest.raises(ValueError, match="holds no features for 'another'"):
        one.fingerprint(["another"])


def test_empty_store(tmp_path: Path) -> None:
    store = FeatureStore.create_or_open(tmp_path / "new", MANIFEST)
    assert len(store) == 0 and store.manifest == MANIFEST and FeatureStore(tmp_path / "new").manifest == MANIFEST


def test_absent_key(tmp_path: Path) -> None:
    write(tmp_path, KEYS[:1])
    with pytest.raises(ValueError, match=r"holds no features for 'stage2/absent'; run engine\.encode"):
        FeatureStore(tmp_path).read("stage2/absent")


@pytest.mark.parametrize(
    "field", ["encoder", "num_frames", "sampling", "preprocess", "tokens", "channels", "dtype", "compute_dtype"]
)
def test_another_manifest_is_refused(tmp_path: Path, field: str) -> None:
    write(tmp_path, KEYS)
    other = replace(MANIFEST, **{field: "other" if isinstance(getattr(MANIFEST, field), str) else 99})
    with pytest.raises(ValueError, match=f"was made with {field} .* but .* is expected"):
        FeatureStore.create_or_open(tmp_path, other)
    check(tmp_path, KEYS)


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no feature store: it holds no manifest\.json"):
        FeatureStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json has no field 'encoder'"):
        FeatureStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON: Expecting property name"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"num_frames": 16, "tokens": 8}, "field 'tokens' is 8, but 'num_frames' 16"),
        ({"tokens": 0, "num_frames": 0}, "field 'num_frames' must be a whole number of at least 1, not 0"),
        ({"tokens": -3}, "field 'tokens' must be a whole number of at least 1, not -3"),
        ({"channels": "768"}, "field 'channels' must be a whole number of at least 1, not '768'"),
        ({"channels": True}, "field 'channels' must be a whole number of at least 1, not True"),
        ({"encoder": None}, "field 'encoder' must be a text, not None"),
        ({"dtype": "float12"}, "field 'dtype' must be float16, not 'float12'"),
        ({"dtype": ["float16"]}, "field 'dtype' must be a text, not ['float16']"),
        ({"compute_dtype": "int8"}, "field 'compute_dtype' must be float32 or bfloat16 or float16, not 'int8'"),
    ],
)
def test_a_manifest_that_contradicts_itself_names_the_field(tmp_path: Path, values: dict, fault: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({**asdict(MANIFEST), **values}))
    with pytest.raises(ValueError) as caught:
        FeatureStore(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/manifest.json: {fault}") and "encode into another" in str(
        caught.value
    )


def test_unindexed_shard_is_written_again(tmp_path: Path) -> None:
    """After a kill between writing a shard and its index."""
    write(tmp_path, KEYS[:8])
    (tmp_path / "00000-000001.parquet").unlink()
    check(tmp_path, KEYS[:4])
    write(tmp_path, KEYS[4:])
    check(tmp_path, KEYS)


def test_half_written_files_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, KEYS[:4])
    (tmp_path / ".00000-000001.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / ".00000-000001.parquet.123.tmp").write_bytes(b"half")
    write(tmp_path, KEYS[4:])
    check(tmp_path, KEYS)


@pytest.mark.parametrize("damage", ["shorter", "empty", "missing", "longer"])
def test_torn_shard(tmp_path: Path, damage: str) -> None:
    """Readers refuse it and name it; a writer makes its records again, and no others."""
    write(tmp_path, KEYS)
    shard = tmp_path / "00000-000001.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    if damage != "missing":
        shard.write_bytes({"shorter": content[:-1], "empty": b"", "longer": content + b"x"}[damage])
    with pytest.raises(ValueError, match=r"the shard .*00000-000001\.safetensors .*; run engine\.encode again"):
        FeatureStore(tmp_path)
    store = FeatureStore.create_or_open(tmp_path, MANIFEST)
    assert sorted(store.keys) == sorted(KEYS[:4] + KEYS[8:])
    write(tmp_path, KEYS[4:8])
    check(tmp_path, KEYS)


def test_torn_index(tmp_path: Path) -> None:
    write(tmp_path, KEYS)
    index = tmp_path / "00000-000002.parquet"
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"the index .*00000-000002\.parquet is damaged"):
        FeatureStore(tmp_path)
    write(tmp_path, KEYS[8:])
    check(tmp_path, KEYS)


def test_one_writer_per_rank(tmp_path: Path) -> None:
    store = FeatureStore.create_or_open(tmp_path, MANIFEST)
    with FeatureWriter(store), pytest.raises(ValueError, match=r"another process is writing to .* as rank 0"):
        FeatureWriter(store)
    with FeatureWriter(store, rank=0), FeatureWriter(store, rank=1):
        pass


def test_writers_of_one_rank_do_not_collide_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system whose locks do not reach other machines, each shard is still written by one writer only."""

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("dataloaders.locks.fcntl.flock", refuse)
    store = FeatureStore.create_or_open(tmp_path, MANIFEST)
    with ExitStack() as stack:
        writers = [stack.enter_context(FeatureWriter(store, shard_records=2)) for _ in range(4)]
        for i in range(40):
            writers[i * 7 % 4].add({f"k{i}": record(f"k{i}")})
    check(tmp_path, [f"k{i}" for i in range(40)])
    assert len(list(tmp_path.glob("*.parquet"))) == len(list(tmp_path.glob("*.safetensors"))) == 20


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    """Three processes of three ranks."""
    FeatureStore.create_or_open(tmp_path, MANIFEST)
    code = (
        "import sys, pathlib; from tests.dataloaders.store.test_store import write; r = int(sys.argv[2]); "
        "write(pathlib.Path(sys.argv[1]), [f'r{r}k{i}' for i in range(50)], rank=r, shard_records=3)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(r)]) for r in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    check(tmp_path, [f"r{r}k{i}" for r in range(3) for i in range(50)])


def test_a_million_records_open_faster_than_pyarrow_lists_their_keys(tmp_path: Path) -> None:
    """977 shards in the form of engine.encode; their features are holes in the files. CPU time, as a ratio in one run."""
    manifest = replace(MANIFEST, num_frames=100, tokens=100, channels=768)
    FeatureStore.create_or_open(tmp_path, manifest)
    for number, first in enumerate(range(0, 10**6, 1024)):
        count = min(1024, 10**6 - first)
        size = count * 100 * 768 * 2
        fields = {"dtype": "F16", "shape": [count, 100, 768], "data_offsets": [0, size]}
        header = json.dumps({"features": fields}).encode().ljust(96)
        with (tmp_path / f"00000-{number:06d}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)
        keys = [f"stage2/v{i:07d}" for i in range(first, first + count)]
        pq.write_table(pa.table({"key": keys}), tmp_path / f"00000-{number:06d}.parquet", use_dictionary=False)
    ratios = []
    for _ in range(3):  # the garbage of other tests may be collected during one of them
        gc.collect()
        start = time.process_time()
        store = FeatureStore(tmp_path)
        opened = time.process_time()
        keys = [key for file in tmp_path.glob("*.parquet") for key in pq.read_table(file).column("key").to_pylist()]
        ratios.append((opened - start) / (time.process_time() - opened))
    assert (
        len(store) == len(keys) == 10**6
        and "stage2/v0999999" in store
        and store.read("stage2/v0500000").shape == (100, 768)
    )
    assert min(ratios) < 1.5, ratios


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    with FeatureWriter(FeatureStore.create_or_open(tmp_path, MANIFEST)) as writer:
        for bad in (np.nan, np.inf, 1e5):
            with pytest.raises(NonFiniteError, match="'k' are not finite in half precision"):
                writer.add({"k": np.full((3, 4), bad, np.float32)})
        writer.add({"good": record("good")})
    check(tmp_path, ["good"])


def test_an_interrupted_run_keeps_its_records(tmp_path: Path) -> None:
    writer = FeatureWriter(FeatureStore.create_or_open(tmp_path, MANIFEST), shard_records=100)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.add({k: record(k) for k in KEYS})
        raise KeyboardInterrupt
    check(tmp_path, KEYS)


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_killed_writer(tmp_path: Path, seconds: float) -> None:
    """After a kill at any time the store opens, holds complete records only, and its rank can be used again."""
    code = (
        "import sys, pathlib; from tests.dataloaders.store.test_store import write; "
        "write(pathlib.Path(sys.argv[1]), [f'k{i}' for i in range(10**6)], shard_records=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not list(tmp_path.glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.wait()
    keys = sorted(FeatureStore(tmp_path).keys)
    assert keys == sorted(f"k{i}" for i in range(len(keys)))
    write(tmp_path, ["after"])
    check(tmp_path, [*keys, "after"])
