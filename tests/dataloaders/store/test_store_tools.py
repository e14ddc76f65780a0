"""Store tools: verify finds damaged records and discards their shard only; merge and import."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dataloaders.files import ABANDONED_AFTER, temporary_sibling
from dataloaders.store import tools as store_tools
from dataloaders.store.__main__ import main
from dataloaders.store.features import FeatureStore, FeatureWriter
from dataloaders.store.tools import discard, merge, verify
from tests.dataloaders.store.test_store import KEYS, MANIFEST, check, record, write


def test_a_good_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, KEYS)
    report = verify(tmp_path)
    assert (report.records, report.shards, report.damage, report.repeated, report.stray) == (11, 3, {}, [], [])
    assert main(["verify", str(tmp_path)]) == 0
    assert "11 records in 3 shards read, 0 shards damaged" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "encoder        abc" in out and "11 in 3 shards" in out and "stage2       11" in out


@pytest.mark.parametrize("byte", [-1, -24 * 4, -24 * 2])
def test_one_changed_bit_is_found_and_discards_one_shard(
    tmp_path: Path, byte: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, KEYS)
    shard = tmp_path / "00000-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[byte] ^= 1
    shard.write_bytes(content)
    FeatureStore(tmp_path)  # the size is right
    row = 4 + byte // 24
    (sentence,) = verify(tmp_path).damage.values()
    assert sentence == f"the shard {shard} holds other bytes for {KEYS[4 + row]!r} than were written"
    assert main(["verify", str(tmp_path)]) == 1
    assert sentence in capsys.readouterr().out
    assert main(["verify", str(tmp_path), "--discard"]) == 1
    assert sorted(FeatureStore(tmp_path).keys) == sorted(KEYS[:4] + KEYS[8:])
    write(tmp_path, KEYS[4:8])
    check(tmp_path, KEYS)
    assert main(["verify", str(tmp_path), "--discard"]) == 0
    assert verify(tmp_path).stray == []


def test_which_decoder_gave_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept in the index and by a merge; indices of earlier versions hold none."""
    write(tmp_path / "old", KEYS[:4])
    for index in (tmp_path / "old").glob("*.parquet"):
        pq.write_table(pq.read_table(index).drop_columns(["decoder"]), index)
    by = dict.fromkeys(KEYS[4:6], "DALI (h264)") | dict.fromkeys(KEYS[6:8], "PyAV (DALI timed out after 600 s)")
    with FeatureWriter(FeatureStore.create_or_open(tmp_path / "new", MANIFEST), shard_records=3) as writer:
        for key, decoder in by.items():
            writer.add({key: record(key)}, decoder)
    assert FeatureStore(tmp_path / "new").decoders() == by
    merge(tmp_path / "out", [tmp_path / "old", tmp_path / "new"])
    assert FeatureStore(tmp_path / "out").decoders() == dict.fromkeys(KEYS[:4], "") | by
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  decoded by DALI (h264): 2",
        "  decoded by PyAV (DALI timed out after 600 s): 2",
    ]


def test_a_changed_header_is_found(tmp_path: Path) -> None:
    write(tmp_path, KEYS[:4])
    shard = tmp_path / "00000-000000.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"[4,3,4]", b"[4,4,3]"))
    assert "does not declare the shape (4, 3, 4)" in next(iter(verify(tmp_path).damage.values()))


@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_a_torn_shard_is_found_among_good_ones(tmp_path: Path, damage: str) -> None:
    write(tmp_path, KEYS)
    shard = tmp_path / "00000-000002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    if damage == "shorter":
        shard.write_bytes(content[:-1])
    report = verify(tmp_path)
    assert [index.name for index in report.damage] == ["00000-000002.parquet"] and report.records == 8


def test_files_of_killed_writers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, KEYS)
    (tmp_path / "00000-000001.parquet").unlink()
    (tmp_path / ".00000-000003.safetensors.9.tmp").write_bytes(b"half")
    names = [p.name for p in verify(tmp_path).stray]
    assert names == [".00000-000003.safetensors.9.tmp", "00000-000001.safetensors"]
    assert main(["verify", str(tmp_path), "--discard"]) == 0
    assert "2 files of 0.0 MB, left by killed writers" in capsys.readouterr().out
    assert verify(tmp_path).stray == []
    check(tmp_path, KEYS[:4] + KEYS[8:])


def test_nothing_is_discarded_while_a_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until its index is written, a running writer's shard looks like that of a killed one."""
    write(tmp_path, KEYS[:4])
    with FeatureWriter(FeatureStore(tmp_path), rank=1, shard_records=1) as writer:
        unfinished = writer._reserve_name()
        assert verify(tmp_path).stray == [unfinished]
        assert main(["verify", str(tmp_path), "--discard"]) == 1
        sentence = f"dataloaders.store: another process is writing to {tmp_path} as rank 1; wait for it or stop it\n"
        assert capsys.readouterr().err == sentence
        assert unfinished.exists()
        writer.add({KEYS[4]: record(KEYS[4])})
    assert discard(tmp_path).stray == [unfinished] and not unfinished.exists()
    check(tmp_path, KEYS[:5])


def test_a_writer_that_starts_during_a_discard_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer of a rank that `discard` locked is refused; the files of another rank are kept."""
    write(tmp_path, KEYS[:4])
    started: list[Path] = []
    real = store_tools.verify

    def slow(path: Path) -> store_tools.Report:
        with pytest.raises(ValueError, match=r"another process is writing to .* as rank 0"):
            FeatureWriter(FeatureStore(path))
        with FeatureWriter(FeatureStore(path), rank=7) as writer:
            started.append(writer._reserve_name())
        return real(path)

    monkeypatch.setattr(store_tools, "verify", slow)
    assert discard(tmp_path).stray == started and started[0].exists()


def test_without_locks_only_files_that_certainly_have_no_writer_are_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("dataloaders.locks.fcntl.flock", refuse)
    write(tmp_path, KEYS)
    (tmp_path / "00000-000001.safetensors").unlink()
    live = temporary_sibling(tmp_path / "00000-000007.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 2**22 + 1)  # higher than any process id
        ended = temporary_sibling(tmp_path / "00000-000008.safetensors")
    recent, old = (tmp_path / f"00000-00000{i}.safetensors" for i in (5, 6))
    for file in (live, ended, recent, old):
        file.write_bytes(b"half")
    day_before = time.time() - ABANDONED_AFTER - 60
    os.utime(old, (day_before, day_before))
    discard(tmp_path)
    assert live.exists() and recent.exists() and not ended.exists() and not old.exists()
    check(tmp_path, KEYS[:4] + KEYS[8:])


def test_commands_on_a_folder_of_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder in the form of engine.encode, with a ledger and samples next to the stores."""
    write(tmp_path / "videos", KEYS[:8])
    write(tmp_path / "images", KEYS[8:])
    (tmp_path / "samples").mkdir()
    (tmp_path / "failures.jsonl").touch()
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("/")] == [f"{tmp_path}/images", f"{tmp_path}/videos"]
    assert [line.split()[1] for line in lines if line.startswith("records")] == ["3", "8"]
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/images: 3 records in 1 shards read, 0 shards damaged",
        f"{tmp_path}/videos: 8 records in 2 shards read, 0 shards damaged",
    ]
    (tmp_path / "videos/00000-000001.safetensors").unlink()
    assert main(["verify", str(tmp_path), "--discard"]) == 1
    assert "videos/00000-000001.safetensors is missing" in capsys.readouterr().out
    check(tmp_path / "videos", KEYS[:4])
    check(tmp_path / "images", KEYS[8:])


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", KEYS[:6], shard_records=1)
    write(tmp_path / "b", KEYS[4:], shard_records=2)
    arguments = ["merge", *(str(tmp_path / name) for name in ("out", "a", "b")), "--shard-records", "8"]
    assert main(arguments) == 0
    assert "11 records copied" in capsys.readouterr().out
    check(tmp_path / "out", KEYS)
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 2 and not verify(tmp_path / "out").damage
    assert merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"]) == 0


def test_merge_refuses_stores_that_differ(tmp_path: Path) -> None:
    write(tmp_path / "a", KEYS[:2])
    with FeatureWriter(FeatureStore.create_or_open(tmp_path / "b", MANIFEST)) as writer:
        writer.add({KEYS[1]: record("other")})
    with pytest.raises(ValueError, match=f"hold different features for '{KEYS[1]}'"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    FeatureStore.create_or_open(tmp_path / "c", replace(MANIFEST, encoder="other"))
    with pytest.raises(ValueError, match="c was made with encoder 'other', but 'abc' is expected"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "c"])


def test_refusals_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"dataloaders.store: {tmp_path} is no feature store")
    assert main(["import", str(tmp_path), str(tmp_path / "s"), "--split", "stage2", "--encoder", "x"]) == 1
    assert capsys.readouterr().err == f"dataloaders.store: {tmp_path} holds no .npy or .pt or .pth file\n"
