"""Two hundred damaged files, and a SIGKILL at twenty moments: no crash, no hang, no silent loss."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataloaders.decode.dali import decoder as dali
from dataloaders.failures import read_failures
from dataloaders.store.features import FeatureStore, FeatureWriter
from engine.encode.check import verify
from engine.encode.config import EncodeConfig
from engine.encode.run import encode, prepare
from tests.clips import write_data
from tests.damage import damage, decode_or_hang
from tests.dataloaders.decode.test_dali_hangs import hanging
from tests.engine.distributed.ranks import CONTEXT
from tests.media import needs_dali, write_video

N = 5
DAMAGED, GOOD = 200, 25

DECODERS = ["pyav", pytest.param("dali", marks=needs_dali)]

REASONS = {
    "truncated": "cut off|the file is empty|is it a video|holds no|damaged|cannot decode",
    "flipped": "cut off|is it a video|holds no|damaged|failed after|gave .* frames|change size|more than can be decoded",
    "overwritten": "cut off|is it a video|holds no|damaged|failed after|gave .* frames|change size|more than can be decoded",
    "garbled": "damaged|failed after|gave .* frames",
    "junk": "is it a video|holds no|cut off",
    "empty": "the file is empty|is it a video|holds no",
    "audio": "holds no video stream",
    "still": "a still image",
    "huge": "more than can be decoded|is it a video|failed after|change size|holds no",
    "endless": "damaged|is it a video|holds no|cut off",
}
"""Allowed reasons for each kind of damage, if it is detected. Kinds that must be detected are in CERTAIN."""

CERTAIN = {"truncated", "junk", "empty", "audio", "still"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A data folder of good and damaged files, one of the good files alone, and the kind of damage by id."""
    root = tmp_path_factory.mktemp("corpus")
    mixed, alone = root / "mixed", root / "alone"
    for folder in (mixed, alone):
        (folder / "stage2/videos").mkdir(parents=True)
    videos = mixed / "stage2/videos"
    vp9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}
    good = [
        write_video(root / "late.mp4", 24),
        write_video(root / "a.webm", 24, **vp9),
        write_video(root / "fast.mp4", 24, container_options={"movflags": "faststart"}),
        write_video(root / "b.webm", 30, **vp9),
        write_video(root / "a.avi", 20, codec="mpeg4"),
        write_video(root / "c.webm", 18, **vp9),
        write_video(root / "vp9.mp4", 24, **vp9),
    ]
    kinds = {path.stem: kind for path, kind in damage(good, videos, DAMAGED).items()}
    names = sorted(kinds)
    for i in range(GOOD):
        # Each good file has a damaged one before and after it, in the same batch.
        name = f"g{i:03d}"
        source = good[i % len(good)]
        for folder in (mixed, alone):
            (folder / f"stage2/videos/{name}{source.suffix}").write_bytes(source.read_bytes())
        names.insert(i * 9, name)
    for folder, listed in ((mixed, names), (alone, [n for n in names if n not in kinds])):
        records = [{"id": name, "conversations": [], "meta": {}} for name in listed]
        (folder / "stage2/pite_143k.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return mixed, alone, kinds


def records(store: Path) -> dict[str, bytes]:
    videos = FeatureStore(store / "videos")
    return {key.partition("/")[2]: videos.read(key).tobytes() for key in videos.keys}


@pytest.mark.parametrize("decoder", DECODERS)
def test_two_hundred_damaged_files(
    corpus: tuple[Path, Path, dict[str, str]],
    clip: Path,
    tmp_path: Path,
    decoder: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", "dataloaders.decode.dali.decoder")
    mixed, alone, kinds = corpus
    config = EncodeConfig(
        data=mixed,
        store=tmp_path / "mixed",
        clip=str(clip),
        num_frames=N,
        batch_size=20,
        workers=1,
        failure_budget=1.0,
        time_limit=30,
        decoder=decoder,  # type: ignore[arg-type]
    )
    started = time.monotonic()
    summary = encode(config)
    assert time.monotonic() - started < 200
    stored = records(config.store)
    failures = list(read_failures(config.store / "failures.jsonl"))
    failed = {f.id.partition("/")[2]: f for f in failures}
    assert len(failures) == len(failed) == summary.failed
    assert len(stored) == summary.encoded == sum(summary.decoders.values())
    assert stored.keys() | failed.keys() == kinds.keys() | {f"g{i:03d}" for i in range(GOOD)}, "none is forgotten"
    assert not stored.keys() & failed.keys()

    encode(replace(config, data=alone, store=tmp_path / "alone"))
    neighbours = records(tmp_path / "alone")
    assert len(neighbours) == GOOD
    assert {name: stored[name] for name in neighbours} == neighbours, "bad neighbours change no bit"

    by_kind = Counter(kinds[name] for name in failed)
    print(decoder, dict(by_kind), dict(summary.decoders))
    for name, failure in failed.items():
        assert Path(failure.path).name in failure.reason
        assert kinds[name] != "renamed", failure.reason
        reason = failure.reason.rpartition(f"{Path(failure.path).name}: ")[2]
        assert any(part in reason for part in _parts(REASONS[kinds[name]], reason)), (kinds[name], reason)
    for kind in CERTAIN:
        assert by_kind[kind] == Counter(kinds.values())[kind], kind
    assert by_kind["flipped"] and by_kind["overwritten"] and by_kind["huge"] and by_kind["garbled"]
    if decoder == "dali":
        assert summary.decoders["DALI (vp9)"] >= GOOD * 4 // 7
        messages = [record.getMessage() for record in caplog.records]
        assert any("rebuilding DALI's pipeline" in line for line in messages), "bad samples spoiled the pipeline"
        assert sum("DALI cannot decode it" in line for line in messages) >= 4, "and each was found in its batch"


def _parts(pattern: str, reason: str) -> list[str]:
    return re.findall(pattern, reason) or ["\0"]


@needs_dali
def test_dali_hangs_and_so_does_one_file(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first DALI pipeline hangs: its batch falls back to PyAV, and a file that hangs PyAV too is a failure."""
    videos = tmp_path / "data/stage2/videos"
    names = [f"v{i}" for i in range(20)]
    for i, name in enumerate(names):
        write_video(videos / f"{name}.mp4", 12 + i, codec="libvpx-vp9", options={"cpu-used": "8"})
    annotations = [{"id": name, "conversations": [], "meta": {}} for name in names]
    (tmp_path / "data/stage2/pite_143k.jsonl").write_text("".join(json.dumps(r) + "\n" for r in annotations))
    config = EncodeConfig(
        data=tmp_path / "data", store=tmp_path / "pyav", clip=str(clip), num_frames=N, batch_size=N, workers=0
    )
    encode(config)

    released = threading.Event()
    hanging(monkeypatch.setattr, released, pipelines=1)
    monkeypatch.setattr(dali, "decode_file", decode_or_hang)
    limited = replace(config, store=tmp_path / "dali", workers=1, decoder="dali", time_limit=2.0, failure_budget=0.1)
    try:
        summary = encode(limited)
    finally:
        released.set()
    assert (summary.encoded, summary.failed) == (19, 1)
    assert summary.decoders == {"PyAV (DALI timed out after 2 s)": 15, "DALI (vp9)": 4}
    (failure,) = read_failures(limited.store / "failures.jsonl")
    assert failure.id == "stage2/v2" and failure.reason.endswith("v2.mp4: it took more than 2 s and was stopped")
    expected, found = records(config.store), records(limited.store)
    (warning,) = [r.getMessage() for r in caplog.records if "One of these files hangs" in r.getMessage()]
    with_pyav = [k for k in names if f"/{k}.mp4" in warning and k != "v2"]
    assert len(with_pyav) == 15
    assert {k: found[k] for k in with_pyav} == {k: expected[k] for k in with_pyav}
    assert found.keys() == expected.keys() - {"v2"}


def test_killed_at_twenty_moments(clip: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, then resume: each record equals an uninterrupted run's and is stored once."""
    data = write_data(tmp_path / "data", videos=36, images=24)
    config = EncodeConfig(
        data=data, store=tmp_path / "reference", clip=str(clip), num_frames=N, batch_size=N, workers=0, shard_records=1
    )
    encode(config)
    killed = replace(config, store=tmp_path / "killed")
    rng, progress = random.Random(0), [0]
    for _ in range(20):
        process = CONTEXT.Process(target=_run, args=(killed,))
        process.start()
        # The moment is a number of further records, so that it works at any speed, plus some milliseconds.
        more = min(60, progress[-1] + rng.randint(0, 3))
        while len(list(killed.store.rglob("0*.parquet"))) < more:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -9, "it ended before it was killed"
        progress.append(len(list(killed.store.rglob("0*.parquet"))))
    assert len(set(progress)) >= 8 and progress[-2] < 60, progress
    encode(killed)
    expected, found = ({**_all(c.store)} for c in (config, killed))
    assert found == expected and len(found) == 96
    keys = [key for index in killed.store.rglob("0*.parquet") for key in pq.read_table(index)["key"].to_pylist()]
    assert len(keys) == len(set(keys)), "nothing is stored twice"
    print(f"records after each kill: {progress}")


def _run(config: EncodeConfig) -> None:
    # The progress bar would clutter the test's output.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    encode(config)
    time.sleep(60)


def _all(store: Path) -> dict[str, bytes]:
    stores = FeatureStore(store / "images"), FeatureStore(store / "videos")
    return {key: s.read(key).tobytes() for s in stores for key in s.keys}


def test_verify_finds_a_record_that_does_not_match_its_file(clip: Path, tmp_path: Path) -> None:
    """`--verify` draws records, decodes and encodes them again."""
    data = write_data(tmp_path / "data", videos=6, images=3)
    config = EncodeConfig(
        data=data, store=tmp_path / "store", clip=str(clip), num_frames=N, batch_size=2 * N, workers=0
    )
    encode(config)
    report = verify(prepare(config)[1], 100)
    assert report == "3 of 3 images and 12 of 12 videos verified: 15 equal in every byte, least cosine 1.000000"
    for number, drawn in (
        (1, "1 of 3 images and 0 of 12"),
        (2, "1 of 3 images and 1 of 12"),
        (5, "1 of 3 images and 4 of"),
    ):
        assert verify(prepare(config)[1], number).startswith(drawn)
    right = FeatureStore(config.store / "videos")
    wrong = FeatureStore.create_or_open(tmp_path / "swapped/videos", right.manifest)
    with FeatureWriter(wrong) as writer:
        # Negated, because a random CLIP gives similar features for two shades of grey.
        writer.add({key: np.array(right.read(key)) * (-1 if key == "stage2/v3" else 1) for key in right.keys})
    with pytest.raises(
        ValueError,
        match=r"1 records are wrong, of 0 of 0 images and 12 of 12 videos; the first is stage2/v3: cosine -1\.0000 with what",
    ):
        verify(prepare(replace(config, store=tmp_path / "swapped"))[1], 100)


@pytest.mark.parametrize("decoder", DECODERS)
def test_pyav_verifies_what_any_decoder_stored(clip: Path, tmp_path: Path, decoder: str) -> None:
    data = write_data(tmp_path / "data", videos=3, images=3)
    write_video(data / "stage2/videos/v1.webm", 20, codec="libvpx-vp9", options={"cpu-used": "8"})
    (data / "stage2/videos/v1.mp4").unlink()
    config = EncodeConfig(data=data, store=tmp_path / "store", clip=str(clip), num_frames=N, batch_size=N, workers=1)
    config = replace(config, decoder=decoder)  # type: ignore[arg-type]
    summary = encode(config)
    assert ("DALI (vp9)" in summary.decoders) == (decoder == "dali")
    report = verify(prepare(config)[1], 100)
    assert report.startswith("3 of 3 images and 6 of 6 videos verified: ") and float(report.rpartition(" ")[2]) >= 0.999
    assert ("9 equal in every byte" in report) == (decoder == "pyav"), report
