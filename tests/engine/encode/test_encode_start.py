"""The start of a run: absent files are counted first, choices are logged, and wrong paths are answered at once."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from dataloaders import derived
from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.preprocess import Preprocess
from dataloaders.failures import BudgetExceeded, read_failures
from dataloaders.ranks import ALONE, Ranks
from dataloaders.store.__main__ import main as store_main
from dataloaders.store.features import FeatureStore
from engine.encode import backend, job, run
from engine.encode.__main__ import main
from engine.encode.backend import Backend
from engine.encode.config import EncodeConfig
from engine.encode.run import encode, prepare
from pite import clip as clip_module
from pite.clip import ClipEncoder
from tests.clips import write_data
from tests.commands import full_disk
from tests.media import needs_dali

N = 5
VIDEOS, IMAGES = 6, 3


@pytest.fixture
def config(clip: Path, tmp_path: Path) -> EncodeConfig:
    data = write_data(tmp_path / "data", VIDEOS, IMAGES)
    return EncodeConfig(data=data, store=tmp_path / "store", clip=str(clip), num_frames=N, workers=0, batch_size=10)


@pytest.fixture
def incomplete(config: EncodeConfig) -> EncodeConfig:
    """Without v1 (two keys), with a folder in place of v3 (two keys) and an empty i2: 5 of 15 media are absent."""
    videos = config.data / "stage2/videos"
    (videos / "v1.mp4").unlink()
    (videos / "v3.mp4").unlink()
    (videos / "v3.mp4").mkdir()
    (config.data / "stage1/images/i2.jpg").write_bytes(b"")
    return config


ABSENT = {"stage1/i2", "stage2/v1", "stage2/v3", "stage3/v1", "stage3/v3"}


def stored(config: EncodeConfig) -> set[str]:
    return {key for kind in ("images", "videos") for key in FeatureStore(config.store / kind).keys}


def flags(config: EncodeConfig, *more: str) -> list[str]:
    values = {"data": config.data, "store": config.store, "clip": config.clip, "num-frames": N, "workers": 0}
    return [*(f"--{name}={value}" for name, value in values.items()), *more]


def test_too_many_absent_files_stop_the_run_before_clip_is_loaded(
    incomplete: EncodeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ClipEncoder, "__init__", lambda *_, **__: pytest.fail("CLIP was loaded"))
        assert main(flags(incomplete, "--log-level=error")) == 1
    error = capsys.readouterr().err
    images, videos = incomplete.data / "stage1/images", incomplete.data / "stage2/videos"
    assert error == (
        f"engine.encode: 5 of 15 media are absent, such as {images / 'i2.jpg'}: the file is empty, {videos / 'v1.mp4'}: No "
        f"such file, {videos / 'v3.mp4'}: it is a folder: more than the failure budget of 1.00%; add --failure-budget 0.34 "
        f"or more to leave them out; all are in {incomplete.store}/failures*.jsonl\n"
    )
    assert {f.id for f in read_failures(incomplete.store / "failures.jsonl")} == ABSENT
    assert main(flags(incomplete, "--failure-budget", "0.34")) == 0, "the value in the message passes"
    assert len(stored(incomplete)) == 10


def test_absent_files_are_logged_and_not_decoded(incomplete: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    real = job.decode_file
    monkeypatch.setattr(job, "decode_file", lambda m, **options: decoded.append(m.key) or real(m, **options))
    summary = encode(replace(incomplete, failure_budget=0.4))
    assert (summary.encoded, summary.failed) == (10, 5)
    assert set(decoded) == {"stage1/i0", "stage1/i1", "stage2/v0", "stage2/v2", "stage2/v4", "stage2/v5"}
    failures = list(read_failures(incomplete.store / "failures.jsonl"))
    assert {f.id for f in failures} == ABSENT and {f.stage for f in failures} == {"find"}
    assert len(failures) == 5


def test_absent_files_and_failures_share_the_budget(incomplete: EncodeConfig) -> None:
    (incomplete.data / "stage2/videos/v5.mp4").write_bytes(b"junk")
    with pytest.raises(BudgetExceeded, match=r"6 of 15 media failed.*; add --failure-budget 0\.4 or more"):
        encode(replace(incomplete, failure_budget=0.34))


def test_files_that_were_encoded_may_be_deleted(config: EncodeConfig) -> None:
    encode(config)
    shutil.rmtree(config.data / "stage2/videos")
    summary = encode(replace(config, failure_budget=0.0))
    assert (summary.encoded, summary.failed) == (0, 0) and not list(config.store.glob("failures*"))


def test_a_file_that_appears_is_encoded_once_by_two_ranks(incomplete: EncodeConfig, config: EncodeConfig) -> None:
    """Ranks look for files at different moments; their shares do not depend on what they find."""
    groups = []
    for rank in range(2):
        _, jobs = prepare(incomplete, Ranks(rank, 2, rank, 2))
        groups += [[m.key for group in j.groups for m in group] for j in jobs]
        target = incomplete.data / "stage2/videos/v1.mp4"
        if not target.exists():
            shutil.copy(incomplete.data / "stage2/videos/v0.mp4", target)
    keys = [key for share in groups for key in share]
    assert len(keys) == len(set(keys)) == 15


def test_every_rank_counts_absent_files_and_one_logs_them(incomplete: EncodeConfig) -> None:
    for rank in (1, 0):
        with pytest.raises(BudgetExceeded, match="5 of 15 media are absent"):
            encode(incomplete, Ranks(rank, 2, rank, 2))
        assert len(list(read_failures(incomplete.store / "failures.jsonl"))) == (5 if rank == 0 else 0)


def test_dry_run_counts_files_that_exist(incomplete: EncodeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(incomplete, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "to decode    2 files; 1 more are absent" in out
    assert re.search(r"to decode    4 files, [\d.]+ h by their headers; 4 more are absent", out)
    assert (
        out.endswith("; add --failure-budget 0.34 or more to leave them out\n") and "a run would stop: 5 of 15" in out
    )
    assert not list(incomplete.store.glob("failures*")) and not stored(incomplete)
    assert main(flags(incomplete, "--dry-run", "--failure-budget", "0.5")) == 0
    assert "would stop" not in capsys.readouterr().out


def test_annotations_are_read_once(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a dry run, two ranks, a verification and the next run together."""
    read: list[str] = []
    real = derived._tasks
    monkeypatch.setattr(derived, "_tasks", lambda path, *rest: read.append(path.name) or real(path, *rest))
    assert main(flags(config, "--dry-run")) == 0
    for rank in range(2):
        encode(config, Ranks(rank, 2, rank, 2))
    assert main(flags(config, "--verify", "3")) == 0
    assert read == ["localized_narratives.jsonl", "pite_143k.jsonl", "video_instruct.json"]
    assert len(stored(config)) == 15


def test_choices_and_counts_are_logged(incomplete: EncodeConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    encode(replace(incomplete, failure_budget=0.4))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "ranks: 1, hosts: 1"
    assert re.fullmatch(rf"CLIP {incomplete.clip} on the CPU \(\d+ threads\) in float32", lines[1])
    assert lines[2] == "decoder PyAV (CLIP runs on the CPU), 0 decoding processes a rank"
    assert [line for line in lines if "absent" in line] == [
        "stage1: 3 images: 2 to encode, 0 stored, 1 absent",
        "stage2: 6 videos: 4 to encode, 0 stored, 2 absent",
        "stage3: 6 videos: 4 to encode, 0 stored, 2 absent",
    ]
    caplog.clear()
    encode(replace(incomplete, failure_budget=0.4))
    assert "stage2: 6 videos: 0 to encode, 4 stored, 2 absent" in caplog.text


def test_why_a_decoder_was_chosen(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "require", lambda device: None)
    assert backend._choose_decoder(config, "cuda") == ("dali", "CLIP runs on a GPU")
    assert backend._choose_decoder(config, "cpu") == ("pyav", "CLIP runs on the CPU")
    assert backend._choose_decoder(replace(config, decoder="dali"), "cpu") == ("dali", "--decoder")

    def refuse(device: str) -> None:
        raise ValueError(f"DALI cannot be used here on {device}")

    monkeypatch.setattr(dali, "require", refuse)
    assert backend._choose_decoder(config, "cuda") == ("pyav", "DALI cannot be used here on cuda")
    with pytest.raises(ValueError, match="DALI cannot be used here"):
        backend._choose_decoder(replace(config, decoder="dali"), "cuda")


def test_dali_that_cannot_start_falls_back_only_by_default(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("DALI cannot decode on cuda here (no NVDEC); use pyav")

    monkeypatch.setattr(dali, "DaliDecoder", refuse)
    monkeypatch.setattr(run, "choose_backend", lambda *_: Backend("cpu", "dali", 0))
    with pytest.raises(ValueError, match="no NVDEC"):
        encode(replace(config, decoder="dali"))
    assert encode(config).encoded == 15
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"DALI cannot decode on cuda here (no NVDEC); use pyav: falling back to PyAV for all {kind}s"
        for kind in ("image", "video")
    ]


class BrokenClip:
    """A CLIP whose compiled form raises what Triton raises without a C compiler."""

    preprocess = Preprocess(8, 8)
    batches: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, path: str, device: str, *, compiled: bool = False) -> None:
        self.compiled = compiled

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        self.batches.append(tuple(frames.shape))
        if self.compiled:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
        return frames


def test_clip_that_cannot_be_compiled_runs_eagerly(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clip_module, "ClipEncoder", BrokenClip)
    encoder = run._load_encoder(replace(config, batch_size=12, num_frames=5), "cuda:0")
    assert isinstance(encoder, BrokenClip) and not encoder.compiled and BrokenClip.batches == [(10, 8, 8, 3)]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "Failed to find C compiler" in warning and "install a C compiler" in warning


@needs_dali
def test_the_first_file_of_a_fallback_is_logged(config: EncodeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """H.264 goes to PyAV, as DALI has no decoder for it on a CPU: one line at the time, and a count at the end."""
    caplog.set_level("INFO")
    run.run(replace(config, decoder="dali", workers=1), Ranks())
    by = "PyAV (DALI has no h264 on cpu)"
    first = f"{config.data / 'stage2/videos/v0.mp4'}: decoded by {by} (the first; all are counted at the end)"
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if by in line] == [first, f"decoded by {by}: {VIDEOS} files"]


@pytest.mark.parametrize(
    ("arguments", "status", "answer"),
    [
        (["--help"], 0, "usage: python -m engine.encode"),
        (["--data", "x", "--stor", "y"], 2, "there is no flag --stor; did you mean --store?"),
        (["--data", "nothing", "--store", "s"], 1, "nothing is no data folder"),
        (["--data", ".", "--store", "s"], 1, ". is no data folder: none of stage1, stage2, stage3, evaluation in it"),
        (["--data", "data", "--store", "s", "--clip", "./none"], 1, "./none is neither a directory nor a Hugging Face"),
        (["--data", "data", "--store", "data/stage2/pite_143k.jsonl"], 1, "is a file, not a folder"),
    ],
)
def test_answers_need_no_torch(tmp_path: Path, arguments: list[str], status: int, answer: str) -> None:
    (tmp_path / "data/stage2").mkdir(parents=True)
    (tmp_path / "data/stage2/pite_143k.jsonl").write_text(json.dumps({"id": "a", "meta": {}}) + "\n")
    code = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'transformers', 'av', 'nvidia'}\n"
        "atexit.register(lambda: print('imported', sorted(heavy & set(sys.modules))))\n"
        "runpy.run_module('engine.encode', run_name='__main__', alter_sys=True)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'kernels')!r}]\n{code}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == status, done.stderr
    assert answer in done.stdout + done.stderr and done.stdout.endswith("imported []\n")
    assert status == 0 or done.stderr.count("\n") == 1


def test_a_file_of_another_duration_than_its_record_is_logged(config: EncodeConfig, caplog) -> None:
    """Its events would be at other frames than their marks."""
    file = config.data / "stage2/pite_143k.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    seconds = records[1]["meta"]["duration"]
    records[1]["meta"]["duration"] = 28.8
    records[2]["meta"]["duration"] += 0.5
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with caplog.at_level(logging.WARNING, "engine"):
        summary = encode(replace(config, failure_budget=0.1))
    assert (summary.failed, summary.inexact) == (1, 1), "records[2] differs by half a second"
    (failure,) = read_failures(config.store / "failures.jsonl")
    assert (failure.id, failure.stage) == (f"stage2/{records[1]['id']}", "check")
    assert f"lasts {seconds:.1f} s, but its annotation is for 28.8 s; is it another video?" in failure.reason
    assert failure.reason in caplog.text
    assert f"stage3/{records[1]['id']}" in stored(config), "another record of the same file gives no duration"
    records[3]["meta"]["duration"] = 28.8
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(BudgetExceeded, match=r"1 of 15 media failed.*another video"):
        encode(replace(config, failure_budget=0.0))


def test_clips_that_were_cut_before_are_used_whole(config: EncodeConfig, caplog) -> None:
    """The record of v1 has the times of its source, but its file is the clip; that of v2 may be either."""
    file = config.data / "stage2/pite_143k.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record, start in zip(records[1:], (100.0, 0.4)):
        lasts = record["meta"]["duration"]
        record["meta"]["split"] = [start, start + lasts + (0.3 if start < 1 else 0.0)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with caplog.at_level(logging.INFO, "engine"):
        run.run(replace(config, failure_budget=0.1), ALONE)
    assert "1 files are clips that were cut before" in caplog.text
    store = FeatureStore(config.store / "videos")
    whole, cut = (store.read(f"{split}/{records[1]['id']}") for split in ("stage3", "stage2"))
    np.testing.assert_array_equal(whole, cut)
    (failure,) = read_failures(config.store / "failures.jsonl")
    assert failure.id == f"stage2/{records[2]['id']}" and "may be the clip from 0.4 to 2.3 s" in failure.reason


def test_a_split_with_a_store_of_its_own_is_left_alone(config: EncodeConfig, tmp_path: Path, caplog) -> None:
    """Imported features of stage 2 leave the other splits to be encoded, with another encoder."""
    (tmp_path / "npy").mkdir()
    for i in range(VIDEOS):
        np.save(tmp_path / f"npy/v{i}.npy", np.full((N, 8), i, np.float16))
    own = ["import", str(tmp_path / "npy"), str(config.store / "stage2"), "--split", "stage2", "--encoder", "other"]
    assert store_main(own) == 0
    with caplog.at_level(logging.INFO, "engine"):
        summary = encode(config)
    assert (summary.encoded, summary.failed) == (VIDEOS + IMAGES, 0)
    assert {key.partition("/")[0] for key in stored(config)} == {"stage1", "stage3"}
    assert f"not encoded, because they have stores of their own: {config.store / 'stage2'}" in caplog.text
    assert len(FeatureStore(config.store / "stage2")) == VIDEOS


def test_a_full_disk_is_named_by_its_path(config: EncodeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(config, "--dry-run")) == 0, "the lists of media are written"
    capsys.readouterr()
    with full_disk(400):
        assert main(flags(config)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"engine\.encode: {config.store}/\S+: File too large", error), error
