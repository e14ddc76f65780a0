"""Features of other programs: NumPy's and PyTorch's files, odd shapes, bad files within the budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders.failures import read_failures
from dataloaders.store.__main__ import main
from dataloaders.store.features import FeatureStore
from dataloaders.store.imports import FeatureFolder, import_features
from dataloaders.store.layout import has_own_store, store_of
from tests.dataloaders.store.test_store import MANIFEST, check, record


def npy_folder(path: Path, count: int = 5, dtype: type = np.float16) -> Path:
    path.mkdir()
    for i in range(count):
        np.save(path / f"v{i}.npy", record(f"stage2/v{i}").astype(dtype))
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_folder_of_npy_files(tmp_path: Path, dtype: type) -> None:
    folder, store = npy_folder(tmp_path / "npy", dtype=dtype), tmp_path / "store"
    arguments = ["import", str(folder), str(store), "--split", "stage2", "--shard-records", "2"]
    assert main([*arguments, "--encoder", "abc", "--sampling", "linspace", "--preprocess", "224"]) == 0
    assert check(store, [f"stage2/v{i}" for i in range(5)]).manifest == MANIFEST
    np.save(folder / "v5.npy", record("stage2/v5"))
    assert main([*arguments, "--like", str(store)]) == 0
    check(store, [f"stage2/v{i}" for i in range(6)])


def test_npy_folder_has_the_methods_of_a_store(tmp_path: Path) -> None:
    folder = FeatureFolder(npy_folder(tmp_path / "npy"), "stage2")
    assert len(folder) == 5 and "stage2/v3" in folder and "v3" not in folder
    assert np.array_equal(folder.read("stage2/v3"), record("stage2/v3").astype(np.float16))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((2, 4), np.float16), r"v1\.npy holds an array of shape \(2, 4\), the others \(3, 4\)"),
        (np.zeros((3, 4), np.int64), r"v1\.npy holds int64, not floating-point"),
        (b"junk", r"v1\.npy is no readable \.npy file"),
        (np.array([[{}]]), r"v1\.npy is no readable \.npy file"),
        (np.full((3, 4), np.nan), "'stage2/v1' are not finite"),
    ],
)
def test_npy_files_that_are_refused(tmp_path: Path, content: np.ndarray | bytes, reason: str) -> None:
    folder = npy_folder(tmp_path / "npy", 1)
    if isinstance(content, bytes):
        (folder / "v1.npy").write_bytes(content)
    else:
        np.save(folder / "v1.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=reason):
        import_features(FeatureFolder(folder, "stage2"), tmp_path / "store", MANIFEST)


def test_flags_of_an_import_are_checked_before_it_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = npy_folder(tmp_path / "npy"), tmp_path / "features/videos"
    for flags, sentence in [
        (["--split", "stage9"], "--split must begin with stage1, stage2, stage3, evaluation, not 'stage9'"),
        (["--split", "stage2", "--data", str(tmp_path / "gone")], f"{tmp_path / 'gone'}: no such data folder"),
        (["--split", "stage2", "--data", str(tmp_path)], "holds none of pite_143k.jsonl"),
        (["--split", "stage2", "--failure-budget", "2"], "--failure-budget is a share between 0 and 1, not 2.0"),
    ]:
        assert main(["import", str(folder), str(output), "--encoder", "x", *flags]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1 and not output.exists()


def test_an_import_names_the_budget_that_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And reads the keys of the annotations once."""
    folder, output = npy_folder(tmp_path / "npy"), tmp_path / "features/videos"
    (tmp_path / "data/stage2").mkdir(parents=True)
    records = [{"id": f"v{i}", "meta": {}} for i in range(7)]
    (tmp_path / "data/stage2/pite_143k.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    arguments = [
        "import",
        str(folder),
        str(output),
        "--split",
        "stage2",
        "--encoder",
        "x",
        "--data",
        str(tmp_path / "data"),
    ]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert (
        f"2 of 7 media of stage2 have no file in {folder}, such as 'stage2/v5', more than the failure budget" in error
    )
    assert error.endswith("; add --failure-budget 0.29 or more to leave them out\n")
    (listed,) = (tmp_path / "features/media").iterdir()
    before = listed.stat().st_mtime_ns
    assert main([*arguments, "--failure-budget", "0.29"]) == 0
    assert "2 media of" in capsys.readouterr().out and listed.stat().st_mtime_ns == before
    assert [f.id for f in read_failures(tmp_path / "features/failures.jsonl")] == ["stage2/v5", "stage2/v6"]


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"features": t}, lambda t: t[None], lambda t: t[:, None], lambda t: t.bfloat16()]
)
def test_files_of_pytorch(tmp_path: Path, wrap) -> None:
    (tmp_path / "pt").mkdir()
    exact = np.arange(12, dtype=np.float32).reshape(3, 4)
    for i in range(2):
        torch.save(wrap(torch.from_numpy(exact)), tmp_path / "pt" / f"v{i}.pt")
    folder = FeatureFolder(tmp_path / "pt", "stage2")
    assert (folder.tokens, folder.channels) == (3, 4) and np.array_equal(folder.read("stage2/v1"), exact)


def test_files_of_stills(tmp_path: Path) -> None:
    np.save(tmp_path / "1.npy", np.arange(4, dtype=np.float16))
    folder = FeatureFolder(tmp_path, "stage1/coco")
    assert (folder.tokens, folder.channels) == (1, 4) and folder.read("stage1/coco/1").tolist() == [[0, 1, 2, 3]]


def test_files_with_more_frames_are_sampled(tmp_path: Path) -> None:
    """By the rule of video frames, from each file's own number."""
    (tmp_path / "npy").mkdir()
    for i, frames in enumerate((5, 9, 2)):
        np.save(tmp_path / "npy" / f"v{i}.npy", np.arange(frames, dtype=np.float32)[:, None] + np.zeros(4, np.float32))
    folder = FeatureFolder(tmp_path / "npy", "stage2", num_frames=3)
    rows = [folder.read(f"stage2/v{i}")[:, 0].tolist() for i in range(3)]
    assert rows == [[0, 2, 4], [0, 4, 8], [0, 0, 1]]
    arguments = ["import", str(tmp_path / "npy"), str(tmp_path / "f/stage2"), "--split", "stage2", "--encoder", "x"]
    assert main([*arguments, "--num-frames", "3"]) == 0
    assert FeatureStore(tmp_path / "f/stage2").manifest.tokens == 3


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of the file was run",)


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Code(), tmp_path / "v0.pt")
    with pytest.raises(ValueError, match=r"v0\.pt is no readable \.pt file"):
        FeatureFolder(tmp_path, "stage2")
    assert "was run" not in capsys.readouterr().out


def test_bad_files_are_logged_within_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = npy_folder(tmp_path / "npy", 8)
    (folder / "v0.npy").write_bytes(b"junk")
    np.save(folder / "v5.npy", np.zeros((7, 4), np.float16))
    arguments = ["import", str(folder), str(tmp_path / "f/stage2"), "--split", "stage2", "--encoder", "x"]
    assert main(arguments) == 1
    assert "1 of 8 files cannot be imported, more than the failure budget of 1.00%" in capsys.readouterr().err
    assert main([*arguments, "--failure-budget", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "6 records copied" in out and "2 files could not be imported, the first: " in out
    failures = {f.id: f for f in read_failures(tmp_path / "f/failures.jsonl")}
    assert (
        failures.keys() == {"stage2/v0", "stage2/v5"}
        and "shape (7, 4), the others (3, 4)" in failures["stage2/v5"].reason
    )


def test_a_split_may_have_a_store_of_its_own(tmp_path: Path) -> None:
    assert store_of(tmp_path, "stage1") == tmp_path / "images"
    assert store_of(tmp_path, "stage2") == store_of(tmp_path, "evaluation") == tmp_path / "videos"
    FeatureStore.create_or_open(tmp_path / "stage2", MANIFEST)
    assert store_of(tmp_path, "stage2") == tmp_path / "stage2" and has_own_store(tmp_path, "stage2")
    assert store_of(tmp_path, "stage3") == tmp_path / "videos" and not has_own_store(tmp_path, "stage3")
