"""The CPU decodes a share of the videos and DALI the others: by name, stored, and the same after a kill. DALI runs on the CPU here."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dataloaders.decode.dali.share import is_for_the_cpu
from dataloaders.records import Media
from dataloaders.store.features import FeatureStore
from engine.encode import share
from engine.encode.config import EncodeConfig
from engine.encode.run import encode, prepare
from engine.encode.share import agreed_share, estimated_share, stored_share
from tests.engine.distributed.ranks import CONTEXT
from tests.engine.encode.test_encode_damage import _run, records
from tests.media import needs_dali, write_video

VIDEOS = 24


def test_the_choice_is_by_name() -> None:
    media = [Media(f"stage2/{i}", Path(f"/a/{i}.mp4")) for i in range(2000)]
    chosen = [is_for_the_cpu(m, 0.3) for m in media]
    assert 0.26 < sum(chosen) / len(media) < 0.34
    moved = [replace(m, key=f"stage3/{m.key}", path=Path("/b") / m.path.name) for m in media]
    assert [is_for_the_cpu(m, 0.3) for m in moved] == chosen, "all keys of a file agree, wherever it lies"
    assert all(is_for_the_cpu(m, 0.5) for m, c in zip(media, chosen) if c), "a larger share holds a smaller one"
    assert not any(is_for_the_cpu(m, 0.0) for m in media) and all(is_for_the_cpu(m, 1.0) for m in media)


def test_the_share_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    assert agreed_share(store, None, 0.2, write=False) == 0.2 and not store.exists()
    assert agreed_share(store, None, 0.2, write=True) == 0.2
    assert agreed_share(store, None, 0.4, write=True) == agreed_share(store, 0.2, 0.4, write=True) == 0.2
    with pytest.raises(ValueError, match=r"--cpu-share is 0\.5, but .* was begun with 0\.2"):
        agreed_share(store, 0.5, 0.2, write=True)
    assert [path.name for path in store.iterdir()] == [share.FILE]
    monkeypatch.setattr(share, "stored_share", lambda s, first=[None]: first.pop() if first else stored_share(s))
    assert agreed_share(store, None, 0.4, write=True) == 0.2, "another process stored it in between"
    (store / share.FILE).write_text(json.dumps({"cpu_share": 3}))
    with pytest.raises(ValueError, match="cpu_share is 3, not a share"):
        stored_share(store)


def test_estimates() -> None:
    """More cores take more, more engines less; a machine without cores or engines decodes with the other alone."""
    assert estimated_share(0, 7) == 0.0 and estimated_share(8, 0) == 1.0
    assert estimated_share(8, 7) < estimated_share(8, 5) < estimated_share(16, 5) < 0.5


@needs_dali
def test_a_killed_hybrid_run_stores_the_same_bytes(clip: Path, tmp_path: Path) -> None:
    """Killed after some records, resumed without the flag, with the files in another order: the same bytes and decoders."""
    videos = tmp_path / "data/stage2/videos"
    for i in range(VIDEOS):
        write_video(videos / f"v{i}.webm", 8 + i % 5, codec="libvpx-vp9", options={"cpu-used": "8"})
    annotations = [json.dumps({"id": f"v{i}", "conversations": [], "meta": {}}) + "\n" for i in range(VIDEOS)]
    (tmp_path / "reversed/stage2").mkdir(parents=True)
    (tmp_path / "reversed/stage2/videos").symlink_to(videos)
    (tmp_path / "data/stage2/pite_143k.jsonl").write_text("".join(annotations))
    (tmp_path / "reversed/stage2/pite_143k.jsonl").write_text("".join(annotations[::-1]))
    config = EncodeConfig(
        data=tmp_path / "data",
        store=tmp_path / "reference",
        clip=str(clip),
        num_frames=5,
        batch_size=5,
        workers=1,
        shard_records=1,
        decoder="dali",
        cpu_share=0.5,
    )
    whole = encode(config)
    assert whole.decoders.keys() == {"PyAV", "DALI (vp9)"} and min(whole.decoders.values()) >= VIDEOS // 5
    killed = replace(config, data=tmp_path / "reversed", store=tmp_path / "killed")
    process = CONTEXT.Process(target=_run, args=(killed,))
    process.start()
    while len(list(killed.store.rglob("0*.parquet"))) < 4:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    before = len(records(killed.store))
    assert 0 < before < VIDEOS, "killed too late"
    rest = encode(replace(killed, cpu_share=None))
    assert sum(rest.decoders.values()) == VIDEOS - before
    assert records(killed.store) == records(config.store)
    by = FeatureStore(config.store / "videos").decoders()
    assert FeatureStore(killed.store / "videos").decoders() == by and Counter(by.values()) == whole.decoders
    (job,) = prepare(replace(killed, cpu_share=None))[1]
    assert job.backend.cpu_share == 0.5
    alone = encode(replace(config, store=tmp_path / "alone", cpu_share=0.0))
    assert alone.decoders == Counter({"DALI (vp9)": VIDEOS})
