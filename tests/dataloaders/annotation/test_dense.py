"""Dense tracks in archives, reduced to key points one archive after another, and made into records."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as save_safetensors

from dataloaders.annotation import steps
from dataloaders.annotation.__main__ import main as annotate
from dataloaders.annotation.dense import main
from dataloaders.failures import read_failures
from dataloaders.formats import read_pite
from tests.dataloaders.formats.test_vtimellm import record

T, SIDE = 20, 24
IDS = ["aaaaaaaaaaa", "bbbbbbbbbbb", "ccccccccccc"]
MARKS = {"<s0>": 0.0, "<e0>": 10.0}
ANSWER = "From <s0> to <e0>, a dog runs."


def grid() -> np.ndarray:
    """(T, H, W, 3): every point of a frame; those on the left half move down by a fifth, and lose sight in the end."""
    centres = (np.arange(SIDE) + 0.5) / SIDE
    start = np.stack(np.meshgrid(centres, centres), -1)
    moving = (start[..., 0] < 0.5)[..., None] * np.array([0.0, 0.2])
    tracks = start + np.linspace(0, 1, T)[:, None, None, None] * moving
    visible = np.ones((T, SIDE, SIDE, 1))
    visible[-1, :, : SIDE // 2] = 0
    return np.concatenate((tracks, visible), -1).astype(np.float16)


def saved(array: object, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, array)
    elif suffix == ".npz":
        np.savez(buffer, **array)
    elif suffix == ".pt":
        torch.save(array, buffer)
    else:
        return save_safetensors(array)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, f"w:{'gz' if path.suffix == '.gz' else ''}") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Records of three clips without videos, their phrases, and masks of the left half for the first two."""
    clips = [record(name, [5.0, 15.0], MARKS, "<video>\nWhat happens?", ANSWER) for name in IDS]
    (tmp_path / "stage2.json").write_text(json.dumps(clips))
    mask = np.zeros((2 * SIDE, 2 * SIDE), bool)
    mask[4:20, 4:20] = True
    for i, name in enumerate(IDS):
        events = [{"sentence": "a dog runs.", "phrases": [{"phrase": "a dog", "start": 0}]}]
        steps.write_json(steps.step_path(tmp_path / "steps", "phrases", name), {"events": events})
        if i < 2:
            steps.write_masks(steps.step_path(tmp_path / "steps", "masks", name), [[mask]])
    return ["--records", str(tmp_path / "stage2.json"), "--work", str(tmp_path / "steps"), "--num-frames", str(T)]


def tracks_of(folder: Path, name: str) -> np.ndarray:
    (points,) = load_file(steps.step_path(folder / "steps", "tracks", name)).values()
    assert points.shape == (3, T, 2)
    return points


def test_archives_become_records(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whole frames and phrases; tar, gzip, zip and standard input; then the records, without a video or a mask."""
    phrase = {"0.0": np.ascontiguousarray(grid()[:, 2:10, 2:10, :2]).reshape(T, -1, 2).astype(np.float32)}
    one = tar(
        tmp_path / "1.tar.gz", {"x/readme.txt": b"", f"x/{IDS[0]}.npy": saved(grid(), ".npy"), "x/other.npy": b""}
    )
    two = zipped(tmp_path / "2.zip", {f"{IDS[1]}.pt": saved({"": torch.from_numpy(grid())}, ".pt")})
    three = tar(tmp_path / "3.tar", {f"{IDS[2]}.safetensors": saved(phrase, ".safetensors")})
    assert main([str(one), str(two), *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{one}: 1 reduced, 1 of no record", f"{two}: 1 reduced"]
    one.unlink()
    assert main([str(two), str(three), *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{two}: 1 there before", f"{three}: 1 reduced"]
    for name in IDS:
        points = tracks_of(tmp_path, name)
        assert (points[:, 0, 0] < 0.5).all() and np.ptp(points[:, :-1], axis=1) == pytest.approx(
            np.tile([0.0, 0.2 * (T - 2) / (T - 1)], (3, 1)), abs=2e-3
        )
    assert (tracks_of(tmp_path, IDS[0])[:, -1] == -1).all() and (tracks_of(tmp_path, IDS[2])[:, -1] != -1).all()
    (tmp_path / "videos").mkdir()
    output = tmp_path / "pite_143k.jsonl"
    made = ["--output", str(output), "--videos", str(tmp_path / "videos"), "--workers", "0", "--no-when-questions"]
    assert annotate([*flags, *made]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == IDS and lines[0]["meta"]["split"] == [5.0, 15.0]
    for line in lines:
        (turn,) = read_pite(line, "", tmp_path, num_frames=T, num_points=3).turns
        (mention,) = turn.mentions
        assert turn.answer[mention.start : mention.end] == "a dog" and mention.trajectory.shape == (3, T, 2)


def test_standard_input(tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar(tmp_path / "1.tar", {f"{IDS[0]}.npy": saved(grid() * [SIDE, SIDE, 1], ".npy")}).read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert main(["-", *flags, "--pixels", str(SIDE), str(SIDE)]) == 0
    assert tracks_of(tmp_path, IDS[0])[:, 0, 0].max() < 0.5


@pytest.mark.parametrize(
    ("member", "content", "reason"),
    [
        (f"{IDS[0]}.npy", b"junk", "no readable .npy file"),
        (f"{IDS[0]}.npy", saved(np.array([{}]), ".npy"), "no readable .npy file"),
        (f"{IDS[0]}.npy", saved(np.zeros((4, 4)), ".npy"), "tracks must be (T, H, W, C) or (T, M, C)"),
        (f"{IDS[0]}.npy", saved(np.full((4, 4, 2), 90.0), ".npy"), "give --pixels WIDTH HEIGHT"),
        (f"{IDS[0]}.npz", saved({"7.0": np.zeros((4, 4, 2))}, ".npz"), "array '7.0' is not an"),
        (f"{IDS[0]}.pt", b"junk", "no readable .pt file"),
        (f"{IDS[0]}.pt", saved({"a": 1}, ".pt"), "holds something else than tensors"),
        (f"{IDS[0]}.safetensors", b"junk", "no readable .safetensors file"),
        (f"{IDS[2]}.npy", saved(grid(), ".npy"), "no such file; make it with dataloaders.annotation --until masks"),
    ],
)
def test_bad_members_are_logged_within_the_budget(
    tmp_path: Path, flags: list[str], member: str, content: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tar(tmp_path / "1.tar", {member: content, f"{IDS[1]}.npy": saved(grid(), ".npy")})
    assert main([str(archive), *flags]) == 1
    assert "more than the failure budget" in capsys.readouterr().err
    assert main([str(archive), *flags, "--failure-budget", "0.4"]) == 0
    assert capsys.readouterr().out == f"{archive}: 1 unreadable, 1 reduced\n"
    *_, failure = read_failures(tmp_path / "steps/failures.jsonl")
    assert failure.reason.startswith(f"{archive}: {member}: ") and reason in failure.reason
    assert tracks_of(tmp_path, IDS[1]).shape == (3, T, 2)


def test_archives_that_end_early_and_wrong_flags(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tar(tmp_path / "1.tar", {f"{name}.npy": saved(grid(), ".npy") for name in IDS[:2]})
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    (tmp_path / "no.tar").write_bytes(b"junk")
    for name in ("cut.tar", "no.tar"):
        assert main([str(tmp_path / name), *flags]) == 1
        error = capsys.readouterr().err
        assert "no whole tar or zip archive" in error and error.count("\n") == 1
    for wrong, sentence in [
        (flags[2:], "give one of --records and --captions"),
        ([*flags, "--num-points", "0"], "--num-points"),
    ]:
        with pytest.raises(SystemExit):
            main([str(whole), *wrong])
        assert sentence in capsys.readouterr().err
    assert main([str(tmp_path / "gone.tar"), *flags]) == 1
    assert "no such file" in capsys.readouterr().err
