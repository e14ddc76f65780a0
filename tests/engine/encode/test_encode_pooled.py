"""Encoding for PG-Video-LLaVA: frames by segments, squashed; a record of pooled patches; videos of fewer frames than N."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bench.media import link_ffmpeg
from dataloaders.decode.sampling import segment_indices
from dataloaders.decode.video import decode_video
from dataloaders.ranks import ALONE
from dataloaders.store.features import FeatureStore, Manifest
from engine.encode.config import EncodeConfig
from engine.encode.run import encode, prepare, run
from pite.pooled import PooledEncoder
from tests.media import needs_dali, write_video

N, LENGTHS = 6, (2, 5, 6, 40)
CLIP = Path(__file__).resolve().parents[2] / "golden" / "pg_reference" / "clip"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 2, 5, 6 and 40 frames."""
    folder = tmp_path_factory.mktemp("instruct") / "data"
    (folder / "stage3/videos").mkdir(parents=True)
    records = [{"q": "What?", "a": "It.", "video_id": f"v{length}"} for length in LENGTHS]
    (folder / "stage3/video_instruct.json").write_text(json.dumps(records))
    for length in LENGTHS:
        write_video(folder / f"stage3/videos/v{length}.mp4", length)
    return folder


@pytest.fixture
def config(data: Path, tmp_path: Path) -> EncodeConfig:
    return EncodeConfig(
        data=data,
        store=tmp_path / "store",
        family="pg-video-llava",
        clip=str(CLIP),
        num_frames=N,
        workers=0,
        batch_size=13,
    )


def test_records_are_those_of_the_frames(config: EncodeConfig, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = encode(config)
    assert (summary.encoded, summary.failed) == (len(LENGTHS), 0)
    store, encoder = FeatureStore(config.store / "videos"), PooledEncoder(CLIP)
    for length in LENGTHS:
        frames = decode_video(data / f"stage3/videos/v{length}.mp4", length)[segment_indices(length, N)]
        squashed = np.stack([encoder.preprocess.cropped(frame) for frame in frames])
        patches = encoder.encode(squashed).half().float().numpy()
        record = store.read(f"stage3/v{length}").astype(np.float32)
        count = min(length, N)
        assert record.shape == (N + 16, 48) and not record[count:N].any()
        np.testing.assert_allclose(record[:count], patches.mean(1), atol=2e-3)
        np.testing.assert_allclose(record[N:], patches.mean(0), atol=2e-3)
    run(replace(config, verify=4), ALONE)
    assert "4 of 4 videos verified" in capsys.readouterr().out


def test_the_manifest_names_rule_resize_and_extractor(config: EncodeConfig) -> None:
    encode(config)
    manifest = Manifest.load(config.store / "videos")
    assert (manifest.num_frames, manifest.tokens, manifest.channels) == (N, N + 16, 48)
    assert (manifest.sampling, manifest.extractor) == ("middles of segments", "pooled_patches")
    assert json.loads(manifest.preprocess)["filter"] == "nearest"
    assert not (config.store / "images").exists(), "the family has no stills"
    with pytest.raises(ValueError, match="was made with sampling 'middles of segments', but 'linspace in time'"):
        prepare(replace(config, sampling="time"))


def test_batches_change_no_record(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    one = FeatureStore(config.store / "videos")
    for size in (1, 100):
        other = replace(config, store=tmp_path / f"other{size}", batch_size=size)
        encode(other)
        two = FeatureStore(other.store / "videos")
        for key in one.keys:
            np.testing.assert_allclose(one.read(key), two.read(key), atol=2e-3)


def test_a_store_of_pite_has_no_field_for_the_extractor(tmp_path: Path) -> None:
    """Its file stays as earlier versions wrote it, and they can read it."""
    FeatureStore.create_or_open(tmp_path / "videos", Manifest("e", 4, "s", "p", 4, 2))
    assert "extractor" not in json.loads((tmp_path / "videos" / "manifest.json").read_text())
    shutil.rmtree(tmp_path / "videos")
    pooled = Manifest("e", 4, "s", "p", 9, 2, extractor="pooled_patches")
    assert FeatureStore.create_or_open(tmp_path / "videos", pooled).manifest == pooled


@pytest.fixture(scope="module")
def vp9(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same videos in a codec that DALI decodes on a CPU, wider than high."""
    folder = tmp_path_factory.mktemp("vp9") / "data"
    (folder / "stage3/videos").mkdir(parents=True)
    records = [{"q": "What?", "a": "It.", "video_id": f"v{length}"} for length in LENGTHS]
    (folder / "stage3/video_instruct.json").write_text(json.dumps(records))
    for length in LENGTHS:
        settings = {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}
        write_video(folder / f"stage3/videos/v{length}.webm", length, **settings)
    return folder


@needs_dali
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dalis_frames_are_those_of_the_rule(
    config: EncodeConfig, vp9: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, and with a share of the videos that PyAV decodes. Short videos have fewer frames than N."""
    config = replace(config, data=vp9, decoder="dali", cpu_share=share, workers=1)
    summary = encode(config)
    assert (summary.encoded, summary.failed) == (len(LENGTHS), 0)
    assert set(summary.decoders) == ({"DALI (vp9)", "PyAV"} if share else {"DALI (vp9)"})
    store = FeatureStore(config.store / "videos")
    for length in LENGTHS:
        record = store.read(f"stage3/v{length}")
        assert (record[:N].any(1) == (np.arange(N) < length)).all()
    run(replace(config, verify=len(LENGTHS)), ALONE)  # with PyAV: each row's cosine is at least .999
    assert "4 of 4 videos verified" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("torchcodec") is None, reason="torchcodec is not installed: pip install torchcodec")
def test_torchcodecs_records_are_pyavs(config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV's wheel has FFmpeg's libraries under other names, hence the links for the decoding process."""
    (tmp_path / "links").mkdir()
    link_ffmpeg(tmp_path / "links")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "links"))
    monkeypatch.setattr("dataloaders.decode.torchcodec.require", lambda: None)
    encode(config)
    theirs = replace(config, store=tmp_path / "torchcodec", decoder="torchcodec", workers=1)
    assert set(encode(theirs).decoders) == {"torchcodec"}
    one, two = (FeatureStore(each.store / "videos") for each in (config, theirs))
    assert len(one.keys) == len(LENGTHS) and all((one.read(key) == two.read(key)).all() for key in one.keys)


def test_a_rule_that_gives_fewer_frames_needs_a_family_that_pools_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--sampling segments gives fewer frames for short videos, and --family pite"):
        EncodeConfig(data=tmp_path, store=tmp_path, sampling="segments")
