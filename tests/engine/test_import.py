"""Imported features with a missing file: the import logs it, and training runs without it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dataloaders.failures import LEDGER, Failure, read_failures
from dataloaders.store.__main__ import main as store_main
from dataloaders.store.features import FeatureStore
from engine import train
from tests.engine.workspace import FRAMES, train_arguments


@pytest.fixture
def folder(workspace: Path, tmp_path: Path) -> Path:
    """A .npy file for each of stage 2's 24 videos except one; the file `gone` holds its key."""
    store = FeatureStore(workspace / "features" / "videos")
    keys = sorted(key for key in store.keys if key.startswith("stage2/"))
    assert len(keys) == 24
    (tmp_path / "npy").mkdir()
    for key in keys[1:]:
        np.save(tmp_path / "npy" / f"{key.removeprefix('stage2/')}.npy", store.read(key))
    (tmp_path / "gone").write_text(keys[0])
    return tmp_path / "npy"


def imported(folder: Path, *more: str) -> int:
    output = folder.parent / "features" / "videos"
    return store_main(["import", str(folder), str(output), "--split", "stage2", "--encoder", "VTimeLLM's", *more])


def trained(workspace: Path, folder: Path) -> int:
    flags = {"llm": "random", "max_steps": 1, "store": folder.parent / "features"}
    return train.main(train_arguments(workspace, folder.parent / "out", "2", **flags))


def test_training_goes_on_without_the_missing_file(
    workspace: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, features = (folder.parent / "gone").read_text(), folder.parent / "features"
    data = ["--data", str(workspace / "data")]
    assert imported(folder) == 0
    assert trained(workspace, folder) == 1, "no ledger explains why a feature is missing"
    assert f"1 media, {gone!r} among them, are neither in the feature store" in capsys.readouterr().err

    assert imported(folder, *data) == 1
    error = capsys.readouterr().err
    assert f"1 of 24 media of stage2 have no file in {folder}, such as {gone!r}" in error
    assert "more than the failure budget of 1.00%" in error
    assert not list(features.glob("failures*"))

    for _ in range(2):
        assert imported(folder, *data, "--failure-budget", "0.05") == 0
        assert "1 media of" in capsys.readouterr().out
        (failure,) = read_failures(features / LEDGER)
    file = folder / f"{gone.removeprefix('stage2/')}.npy"
    assert asdict(failure) == asdict(Failure(gone, str(file), "import", f"{file.name}: not among the imported files"))
    assert store_main(["failures", str(features)]) == 0
    assert "1  import  not among the imported files" in capsys.readouterr().out

    assert trained(workspace, folder) == 0
    assert (
        "23 samples, 23 with mentions, 23 with a trajectory, 1 left out whose media are not in the feature store"
        in capsys.readouterr().err
    )
    (left_out,) = read_failures(folder.parent / "out" / "stage2" / "left_out.jsonl")
    assert left_out.id == gone


def test_a_whole_folder_leaves_no_ledger(workspace: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = (folder.parent / "gone").read_text().removeprefix("stage2/")
    np.save(folder / f"{gone}.npy", np.zeros((FRAMES, 16), np.float16))
    assert imported(folder, "--data", str(workspace / "data")) == 0
    assert capsys.readouterr().out.endswith("0 media of " + f"{workspace}/data/stage2 have no features\n")
    assert not list((folder.parent / "features").glob("failures*"))


def test_a_store_of_its_own_is_what_the_stage_trains_on(
    workspace: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Next to a store of another encoder with the other splits."""
    gone, features = (folder.parent / "gone").read_text(), folder.parent / "features"
    np.save(folder / f"{gone.removeprefix('stage2/')}.npy", np.zeros((FRAMES, 16), np.float16))
    shutil.copytree(workspace / "features", features)
    own = ["import", str(folder), str(features / "stage2"), "--split", "stage2", "--encoder", "VTimeLLM's"]
    assert store_main(own) == 0
    assert trained(workspace, folder) == 0
    lineage = json.loads(next((folder.parent / "out").rglob("state.json")).read_text())
    assert "VTimeLLM's" in json.dumps(lineage)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--split", "stage9"], "--split must begin with stage1, stage2, stage3, evaluation, not 'stage9'"),
        (["--split", "stage2/coco"], "names no media whose keys begin with stage2/coco/"),
        (["--failure-budget", "1.5"], "--failure-budget is a share between 0 and 1, not 1.5"),
    ],
)
def test_refusals(
    workspace: Path, folder: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(folder, "--data", str(workspace / "data"), *flags) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
