"""Records as they are published, through the commands: VTimeLLM's in stage 2, and annotation files with dirt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.failures import read_failures
from dataloaders.samples.dataset import StageDataset
from dataloaders.store.__main__ import main as store_main
from dataloaders.store.features import FeatureStore
from engine.encode.__main__ import main as encode_main
from engine.train import main as train_main
from tests.clips import SIZE
from tests.dataloaders.formats.test_vtimellm import DENSE, RECORDS
from tests.engine.workspace import CHANNELS, FRAMES, train_arguments
from tests.media import write_video
from tests.text import llama_like


@pytest.fixture
def vtimellm(tmp_path: Path) -> Path:
    """A data folder of VTimeLLM's records in one array, and imported features for each."""
    (tmp_path / "data/stage2").mkdir(parents=True)
    (tmp_path / "npy").mkdir()
    rng = np.random.default_rng(0)
    for record in RECORDS:
        np.save(tmp_path / f"npy/{record['id']}.npy", rng.standard_normal((FRAMES, CHANNELS)).astype(np.float16))
    own = [
        "import",
        str(tmp_path / "npy"),
        str(tmp_path / "features/stage2"),
        "--split",
        "stage2",
        "--encoder",
        "ViT-L",
    ]
    assert store_main(own) == 0
    return tmp_path


def train(folder: Path, records: list[dict[str, Any]]) -> int:
    (folder / "data/stage2/pite_143k.jsonl").write_text(json.dumps(records))
    flags = {"data": folder / "data", "store": folder / "features", "llm": "random", "global_batch": 7, "epochs": 1}
    return train_main(train_arguments(folder, folder / "run", "2", **flags))


def test_vtimellms_records_train_in_stage_2(vtimellm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [[[0.2, 0.3], [0.4, 0.3]]] * 3
    trajectory = {"turn": 0, "phrase": "a man", "start": 19, "times": [0.0, 9.4], "points": points}
    assert train(vtimellm, [{**DENSE, "trajectories": [trajectory]}, *RECORDS[1:]]) == 0
    assert "stage 2: 7 samples, 1 with mentions, 1 with a trajectory" in capsys.readouterr().err


def test_they_are_refused_without_any_trajectory(vtimellm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(vtimellm, RECORDS) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "none of the 7 samples has a present coordinate" in error and "the field 'trajectories'" in error


def clip_of(name: str, duration: float = 4.0, **changes: Any) -> dict[str, Any]:
    answer = "From <s0> to <e0>, it moves."
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": changes.pop("answer", answer)}]
    meta = {"split": changes.pop("split", None), "duration": duration, "token": {"<s0>": 0.0, "<e0>": 2.0}}
    return {"id": name, "conversations": turns, "meta": meta, **changes}


STAGE_2 = [
    clip_of("a"),
    clip_of("b", 28.8),
    clip_of("c", split=[0, 4]),
    clip_of("c", split=[4, 8]),
    clip_of("cut\ud83d"),
    clip_of("d", answer="so \ud83d nice"),
    clip_of("dir\0/y"),
    clip_of("e", 10**400),
    None,
    clip_of("f"),
]
"""Whole files of 4 s, except that the record of b is for 28.8 s; c is one id for two clips of 8 s."""


def test_a_folder_with_dirt_is_encoded_to_its_end(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names of the files contradict their contents; bad records are named by line, and end no run."""
    data, store = tmp_path / "data", tmp_path / "store"
    for split in ("stage2", "stage3"):
        (data / split).mkdir(parents=True)
    for name in ("a", "b", "f"):
        write_video(data / f"stage2/videos/{name}.mp4", 40, size=(SIZE, SIZE))
    write_video(data / "stage2/videos/c.mp4", 80, size=(SIZE, SIZE))
    (data / "stage2/pite_143k.jsonl").write_text(json.dumps(STAGE_2))  # an array
    lines = [{"q": "What?", "a": "It.", "video_id": name} for name in ("a", "Ptf_2VRj-V0_000001_000003")]
    text = "\ufeff" + "".join(json.dumps(line) + "\n" for line in lines)
    (data / "stage3/video_instruct.json").write_text(text, encoding="utf-8")  # lines
    (data / "stage3/videos").mkdir()
    for name in ("a", "Ptf_2VRj-V0"):
        write_video(data / f"stage3/videos/{name}.mp4", 40, size=(SIZE, SIZE))
    flags = ["--data", str(data), "--store", str(store), "--clip", str(clip), "--num-frames", "5", "--workers", "0"]
    assert encode_main([*flags, "--failure-budget", "0.5"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    keys = {"stage2/a", "stage2/c", "stage2/e", "stage2/f", "stage3/a", "stage3/Ptf_2VRj-V0_000001_000003"}
    (absent, differs) = read_failures(store / "failures.jsonl")
    assert set(FeatureStore(store / "videos").keys) == keys - {"stage2/e"}
    assert (absent.id, absent.stage) == ("stage2/e", "find") and (differs.id, differs.stage) == ("stage2/b", "check")

    available = {*FeatureStore(store / "videos").keys}
    options = {"num_frames": 5, "num_points": 3, "max_length": 2048, "available": available, "failure_budget": 0.6}
    trained = StageDataset(data, 2, llama_like(), **options)  # type: ignore[arg-type]
    assert trained.ids == ["a", "c", "f"] and trained.not_encoded == ["stage2/b"]
    assert len(trained.malformed) == 6 and trained.left_out()[0].reason
    assert len(StageDataset(data, 3, llama_like(), **options)) == 2  # type: ignore[arg-type]
    whole, cut = (FeatureStore(store / "videos").read(f"stage3/{line['video_id']}") for line in lines)
    assert not np.array_equal(whole, cut), "the clip was cut from its source"
