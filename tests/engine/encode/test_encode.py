"""Encoding a data folder: the right features for every key, each encoded once, with damaged files and after kills."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataloaders.decode.video import decode_video
from dataloaders.failures import BudgetExceeded, read_failures
from dataloaders.ranks import ALONE, Ranks
from dataloaders.records import Media
from dataloaders.store.features import FeatureStore
from engine.encode import job
from engine.encode.__main__ import main
from engine.encode.config import EncodeConfig
from engine.encode.run import encode, run
from engine.encode.work import groups_of, partition_by_length, seconds_of
from pite.clip import ClipEncoder
from tests.clips import save_clip, write_data
from tests.damage import decode_or_hang
from tests.media import truncate, write_audio, write_video

N = 5
VIDEOS, IMAGES = 6, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("world") / "data", VIDEOS, IMAGES)


@pytest.fixture
def config(clip: Path, data: Path, tmp_path: Path) -> EncodeConfig:
    return EncodeConfig(
        data=data, store=tmp_path / "store", clip=str(clip), num_frames=N, workers=0, batch_size=12, shard_records=4
    )


def done(config: EncodeConfig) -> tuple[int, int]:
    """Encode; returns the number of media encoded and failed."""
    summary = encode(config)
    return summary.encoded, summary.failed


def records(store: Path) -> dict[str, bytes]:
    """Every record of both stores, as its bytes on disk."""
    stores = FeatureStore(store / "images"), FeatureStore(store / "videos")
    return {key: s.read(key).tobytes() for s in stores for key in s.keys}


def spoiled(data: Path, tmp_path: Path) -> Path:
    """A copy of the data with three videos that cannot be decoded and one image."""
    copy = Path(shutil.copytree(data, tmp_path / "spoiled", symlinks=True))
    videos = copy / "stage2/videos"
    truncate(videos / "v1.mp4", videos / "v1.mp4", 0.5)
    write_audio(videos / "v2.mp4")
    (videos / "v4.mp4").unlink()
    (copy / "stage1/images/i0.jpg").write_bytes(b"")
    return copy


def test_features_are_those_of_the_frames(config: EncodeConfig, data: Path, clip: Path) -> None:
    assert done(config) == (2 * VIDEOS + IMAGES, 0)
    encoder = ClipEncoder(str(clip))
    videos, images = FeatureStore(config.store / "videos"), FeatureStore(config.store / "images")
    assert sorted(videos.keys) == sorted(f"{split}/v{i}" for split in ("stage2", "stage3") for i in range(VIDEOS))
    for i in range(VIDEOS):
        frames = decode_video(data / f"stage2/videos/v{i}.mp4", N, transform=encoder.preprocess.cropped)
        expected = encoder.encode(frames).numpy()
        np.testing.assert_allclose(videos.read(f"stage2/v{i}"), expected, atol=2e-3)
        assert np.array_equal(videos.read(f"stage2/v{i}"), videos.read(f"stage3/v{i}"))
    for i in range(IMAGES):
        with Image.open(data / f"stage1/images/i{i}.jpg") as image:
            frame = encoder.preprocess.cropped(np.array(image))
        assert images.read(f"stage1/i{i}").shape == (1, 16)
        np.testing.assert_allclose(images.read(f"stage1/i{i}"), encoder.encode(frame[None]).numpy(), atol=2e-3)
    assert (videos.manifest.tokens, videos.manifest.channels, images.manifest.tokens) == (N, 16, 1)
    assert videos.manifest.encoder == encoder.checksum and videos.manifest.compute_dtype == "float32"


def test_a_linked_file_is_decoded_once(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    real = job.decode_file
    monkeypatch.setattr(job, "decode_file", lambda m, **options: decoded.append(m.key) or real(m, **options))
    encode(config)
    assert len(decoded) == VIDEOS + IMAGES


@pytest.mark.parametrize("batch_size", [1, 5, 13, 100])
def test_batches_change_no_feature(config: EncodeConfig, tmp_path: Path, batch_size: int) -> None:
    encode(config)
    other = replace(config, store=tmp_path / "other", batch_size=batch_size)
    encode(other)
    one, two = records(config.store), records(other.store)
    assert one.keys() == two.keys()
    for key in one:
        a, b = (np.frombuffer(r[key], np.float16).astype(np.float32) for r in (one, two))
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_parts_of_hosts_give_the_same_records(config: EncodeConfig, data: Path, tmp_path: Path) -> None:
    """Hosts with different numbers of ranks, one after the other; absent files are logged once."""
    bad = replace(config, data=spoiled(data, tmp_path), failure_budget=1.0)
    encode(bad)
    shared = replace(bad, store=tmp_path / "shared")
    for part, size in (("2/2", 3), ("1/2", 1)):
        for rank in range(size):
            encode(replace(shared, part=part), Ranks(rank, size, rank, size))
    assert records(shared.store) == records(bad.store)
    failed = [sorted(f.id for f in read_failures(store.store / "failures.jsonl")) for store in (bad, shared)]
    assert failed[0] == failed[1] and failed[0]
    assert {int(p.name[:5]) // 1000 for p in (shared.store / "videos").glob("*.safetensors")} == {0, 1}


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "1/2/3"])
def test_a_part_is_a_number_of_parts(config: EncodeConfig, part: str) -> None:
    with pytest.raises(ValueError, match="--part is a number and their count, such as 2/3"):
        replace(config, part=part)


def test_one_torchrun_on_several_hosts_is_refused(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8, "GROUP_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "pite"}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"torchrun --standalone --nproc-per-node 8 -m engine.encode .* --part i/2"):
        config.check_paths()


def test_processes_give_the_same_bytes(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    parallel = replace(config, store=tmp_path / "other", workers=2)
    encode(parallel)
    assert records(parallel.store) == records(config.store)


def test_two_ranks_give_the_same_records(config: EncodeConfig, data: Path, tmp_path: Path) -> None:
    """Each process encodes half, each file once; both share the failure log and its budget."""
    bad = replace(config, data=spoiled(data, tmp_path), failure_budget=1.0)
    encode(bad)
    shared = tmp_path / "shared"
    flags = {"data": bad.data, "store": shared, "clip": config.clip, "num-frames": N, "workers": 0, "batch-size": 12}
    command = [sys.executable, "-m", "engine.encode", *(f"--{k}={v}" for k, v in flags.items()), "--failure-budget=1"]
    environments = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", **environment},
        )
        for environment in environments
    ]
    output = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert records(shared) == records(bad.store)
    indices = list(shared.rglob("0*.parquet"))
    assert {p.name[:5] for p in indices} == {"00000", "00001"}
    keys = [key for index in indices for key in pq.read_table(index)["key"].to_pylist()]
    assert len(keys) == len(set(keys)), "nothing is encoded twice"
    failures = [sorted(f.id for f in read_failures(store / "failures.jsonl")) for store in (shared, bad.store)]
    assert failures[0] == failures[1] and len(failures[0]) == 7
    # On a busy machine the rank that reads the annotations shows a bar of its own.
    assert "videos/s" in output[0][1] and "videos/s" not in output[1][1], "one bar"
    assert all(f"rank {rank} of 2: " in output[rank][0] for rank in range(2))


def test_a_second_run_does_nothing(config: EncodeConfig) -> None:
    encode(config)
    before = {p: p.stat().st_mtime_ns for p in config.store.rglob("*") if p.suffix != ".lock"}
    assert done(config) == (0, 0)
    assert before == {p: p.stat().st_mtime_ns for p in config.store.rglob("*") if p.suffix != ".lock"}


def test_failures_are_logged_and_do_not_change_other_features(config: EncodeConfig, data: Path, tmp_path: Path) -> None:
    encode(config)
    bad = replace(config, data=spoiled(data, tmp_path), store=tmp_path / "other", failure_budget=0.5)
    assert done(bad) == (2 * VIDEOS + IMAGES - 7, 7)
    reasons = {f.id: f.reason for f in read_failures(bad.store / "failures.jsonl")}
    videos = {f"{split}/{name}" for split in ("stage2", "stage3") for name in ("v1", "v2", "v4")}
    assert reasons.keys() == videos | {"stage1/i0"}
    assert "cut off" in reasons["stage2/v1"] and "no video stream" in reasons["stage2/v2"]
    assert "No such file" in reasons["stage2/v4"] and "empty" in reasons["stage1/i0"]
    good = records(config.store)
    assert records(bad.store) == {key: value for key, value in good.items() if key not in reasons}


def test_repaired_files_are_encoded_by_the_next_run(config: EncodeConfig, data: Path, tmp_path: Path) -> None:
    bad = replace(config, data=spoiled(data, tmp_path), failure_budget=0.5)
    encode(bad)
    assert done(config) == (7, 0)
    reference = replace(config, store=tmp_path / "other")
    encode(reference)
    assert records(config.store) == records(reference.store)


def test_budget_stops_the_run_and_keeps_its_work(config: EncodeConfig, data: Path, tmp_path: Path) -> None:
    copy = spoiled(data, tmp_path)
    shutil.copy(data / "stage1/images/i0.jpg", copy / "stage1/images/i0.jpg")
    shutil.copy(data / "stage2/videos/v4.mp4", copy / "stage2/videos/v4.mp4")
    bad = replace(config, data=copy, failure_budget=0.1, batch_size=N)
    with pytest.raises(BudgetExceeded, match=r"2 of 15 media failed.*; add --failure-budget 0\.14 or more to leave"):
        encode(bad)
    assert set(records(bad.store)) == {"stage1/i0", "stage1/i1", "stage1/i2", "stage2/v0", "stage3/v0"}


def test_features_that_are_not_finite_are_failures(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ClipEncoder.encode
    monkeypatch.setattr(ClipEncoder, "encode", lambda self, frames: real(self, frames) / 0)
    assert done(replace(config, failure_budget=1.0)) == (0, 2 * VIDEOS + IMAGES)
    failures = list(read_failures(config.store / "failures.jsonl"))
    assert {f.stage for f in failures} == {"encode"} and "not finite" in failures[0].reason


def test_another_encoder_or_frame_count_is_refused(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    before = records(config.store)
    save_clip(tmp_path / "other", seed=1)
    theirs, ours = ClipEncoder(config.clip).checksum, ClipEncoder(str(tmp_path / "other")).checksum
    message = f"was made with encoder '{theirs}', but '{ours}' is expected; encode into another folder (--store)"
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(replace(config, clip=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="was made with num_frames 5, but 6 is expected"):
        encode(replace(config, num_frames=6))
    assert records(config.store) == before


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], config: EncodeConfig, *extra: str) -> tuple[int, str, str]:
        flags = ["--data", config.data, "--store", config.store, "--clip", config.clip, "--num-frames", N]
        status = main([*map(str, flags), "--workers", "0", *extra])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    def test_success(self, capsys: pytest.CaptureFixture[str], config: EncodeConfig) -> None:
        status, out, err = self.run(capsys, config)
        assert status == 0 and out == f"15 media encoded into {config.store}\n"
        assert "videos/s" in err and "frames/s" in err and "waiting for decode" in err

    @pytest.mark.parametrize("what", ["data", "clip", "record"])
    def test_one_sentence(
        self, capsys: pytest.CaptureFixture[str], config: EncodeConfig, tmp_path: Path, what: str
    ) -> None:
        if what == "record":
            broken = tmp_path / "data/stage2"
            broken.mkdir(parents=True)
            (broken / "pite_143k.jsonl").write_text('{"id": "a", "meta": {}}\n{"id": 3.5}\n')
            config = replace(config, data=tmp_path / "data")
            reason = f"{broken / 'pite_143k.jsonl'}:2: field 'id' must be str or int, not float"
        else:
            config = replace(config, **{what: tmp_path / "nothing"})
            reason = f"--clip {tmp_path / 'nothing'}" if what == "clip" else str(tmp_path / "nothing")
        status, out, err = self.run(capsys, config, "--log-level", "error")
        assert status == 1 and not out
        assert err.startswith(f"engine.encode: {reason}") and err.count("\n") == 1
        if what == "record":
            assert err.endswith(
                "; 1 of 2 records name no media, more than the failure budget of 1.00%; add --failure-budget 0.5 or more to "
                "leave them out\n"
            )

    def test_failures_are_announced(
        self,
        capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
        config: EncodeConfig,
        tmp_path: Path,
    ) -> None:
        caplog.set_level("INFO")
        config = replace(config, data=spoiled(config.data, tmp_path))
        status, out, _ = self.run(capsys, config, "--failure-budget", "1")
        first, *report = out.splitlines()
        assert status == 0 and first.endswith(", 7 failed: see failures.*.jsonl")
        assert report[0] == "7 media failed, 0 more were encoded since" and len(report) == 5
        assert [line.split()[0] for line in report[1:]] == ["2", "2", "2", "1"]
        assert "decoded by PyAV: 5 files\n" in caplog.text
        assert caplog.text.count("(the first; all are counted at the end)") == 2, "v1 and v2, each for two splits"

    @pytest.mark.parametrize(
        ("extra", "reason"),
        [
            (["--num-frame", "3"], "there is no flag --num-frame; did you mean --num-frames?"),
            (["--failure-budget", "5"], "--failure-budget is a share between 0 and 1, not 5.0"),
            (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
            (["--workers", "-1"], "--workers must be 0 or more, not -1"),
            (["--device", "tpu"], "'tpu' is not accepted; give auto, cpu, cuda"),
        ],
    )
    def test_wrong_flags(
        self, capsys: pytest.CaptureFixture[str], config: EncodeConfig, extra: list[str], reason: str
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            self.run(capsys, config, *extra)
        err = capsys.readouterr().err
        assert caught.value.code == 2 and reason in err and err.count("\n") == 1


def test_killed_and_resumed(config: EncodeConfig, tmp_path: Path) -> None:
    """After a SIGKILL among the videos and a resume, the store equals an uninterrupted run's, byte for byte."""
    data = write_data(tmp_path / "data", videos=40, images=10)
    reference = replace(config, data=data, store=tmp_path / "reference")
    encode(reference)
    expected = records(reference.store)

    killed = tmp_path / "killed"
    flags = {"data": data, "store": killed, "clip": config.clip, "num-frames": N, "workers": 1, "batch-size": 12}
    command = [sys.executable, "-m", "engine.encode", *(f"--{k}={v}" for k, v in flags.items()), "--shard-records=4"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(list(killed.glob("videos/*.parquet"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 0 < len(records(killed)) < len(expected)
    encode(replace(reference, store=killed))
    assert records(killed) == expected
    keys = [key for index in killed.rglob("0*.parquet") for key in pq.read_table(index)["key"].to_pylist()]
    assert len(keys) == len(set(keys)), "nothing is encoded twice"


def test_shares_are_of_equal_length(tmp_path: Path) -> None:
    """Lengths like web videos', some a hundred times the median: the largest share is within 0.1% of the mean."""
    rng = np.random.default_rng(0)
    lengths = {f"v{i}": float(seconds) for i, seconds in enumerate(rng.lognormal(4, 1.2, 3000))}
    media = [Media(key, tmp_path / key, clip=(0, seconds)) for key, seconds in lengths.items()]
    groups = groups_of(media)
    for ranks in (1, 2, 8):
        shares = partition_by_length(groups, ranks)
        assert sorted(g[0].key for share in shares for g in share) == sorted(lengths), "each once"
        loads = [sum(lengths[g[0].key] for g in share) for share in shares]
        assert max(loads) / (sum(loads) / ranks) < 1.001
        order = {key: place for place, key in enumerate(lengths)}
        assert all([order[g[0].key] for g in s] == sorted(order[g[0].key] for g in s) for s in shares)
    assert partition_by_length(groups, 8) == shares, "the same on every rank"


def test_lengths_are_read_from_files(data: Path, tmp_path: Path) -> None:
    media = [Media(f"v{i}", data / f"stage2/videos/v{i}.mp4") for i in range(VIDEOS)]
    missing, still = Media("m", tmp_path / "no.mp4"), Media("i", data / "stage1/images/i0.jpg", "image")
    lengths = seconds_of([*media, replace(media[0], clip=(0.2, 0.7)), missing, still])
    assert lengths == pytest.approx([*((10 + 3 * i) / 10 for i in range(VIDEOS)), 0.5, 0, 0])


def test_dry_run_encodes_nothing(config: EncodeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", config.data, "--store", config.store, "--clip", config.clip, "--num-frames", N, "--workers", 0]
    assert main([*map(str, flags), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{2 * VIDEOS} of 0.2 kB" in printed and f"{VIDEOS} files, " in printed and "A100-80GB" in printed
    assert not records(config.store), "nothing is stored"
    encode(config)
    assert main([*map(str, flags), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("0 are missing") == 2 and "A100" not in printed


def test_a_file_that_hangs_is_stopped(config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(config)
    monkeypatch.setattr(job, "decode_file", decode_or_hang)
    hanging = replace(config, store=tmp_path / "other", workers=1, time_limit=1.5, failure_budget=0.5)
    assert done(hanging) == (2 * VIDEOS + IMAGES - 2, 2)
    reasons = {f.id: f.reason for f in read_failures(hanging.store / "failures.jsonl")}
    assert reasons.keys() == {"stage2/v2", "stage3/v2"}
    assert all(reason.endswith("v2.mp4: it took more than 1.5 s and was stopped") for reason in reasons.values())
    good = records(config.store)
    assert records(hanging.store) == {key: value for key, value in good.items() if key not in reasons}


def test_sampling_by_time_is_another_store(
    config: EncodeConfig, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy", symlinks=True))
    times = [10 * i for i in range(8)] + [180 * i for i in range(1, 9)]
    write_video(copy / "stage2/videos/v2.mp4", 16, times=times)
    by_index = replace(config, data=copy)
    run(by_index, ALONE)
    assert "1 files have a variable frame rate" in caplog.text
    by_time = replace(by_index, store=tmp_path / "time", sampling="time")
    caplog.clear()
    run(by_time, ALONE)
    assert "variable frame rate" not in caplog.text
    one, two = records(by_index.store), records(by_time.store)
    assert {key for key in one if one[key] != two[key]} == {"stage2/v2", "stage3/v2"}
    assert FeatureStore(by_time.store / "videos").manifest.sampling == "linspace in time"
    with pytest.raises(ValueError, match="sampling"):
        encode(replace(by_index, sampling="time"))
