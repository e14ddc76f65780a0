"""Checkpoints are written while training goes on, and hold the state at the moment of the call."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from dataloaders.files import sha256
from engine.checkpoint import (
    STATE_FILE,
    Checkpoint,
    CheckpointWriter,
    ResumeError,
    check_resumable,
    newest_checkpoint,
    restore_checkpoint,
    resume_point,
    tensors_of,
)


def small_run() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(5))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch):
    parameters, optimizer = small_run()
    expected = {name: tensor.clone() for name, tensor in tensors_of(parameters, optimizer).items()}
    may_write = threading.Event()
    write = HuggingFaceStorageWriter.write_data

    def waiting(self, *rest):
        assert may_write.wait(30)
        return write(self, *rest)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", waiting)
    monkeypatch.setattr("engine.checkpoint.FILE_BYTES", 100)
    with CheckpointWriter(tmp_path, {"seed": 0}, keep=2) as writer:
        writer.save(1, parameters, optimizer)
        step(parameters, optimizer)
        writer.check()
        assert newest_checkpoint(tmp_path) == (None, {})
        may_write.set()
    found, damaged = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 1 and not damaged
    files = [load_file(path) for path in found.path.glob("*.safetensors")]
    assert len(files) == 3
    saved = {name: tensor for file in files for name, tensor in file.items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    fresh = {name: nn.Parameter(torch.zeros_like(parameter)) for name, parameter in parameters.items()}
    other = torch.optim.AdamW(fresh.values(), lr=0.1, fused=True)
    for one, theirs in ((parameters, optimizer), (fresh, other)):
        restore_checkpoint(found, one, theirs, {"seed": 0})
        assert all(torch.equal(t, expected[n]) for n, t in tensors_of(one, theirs).items())


def test_the_newest_checkpoints_are_kept(tmp_path: Path):
    """And the unfinished checkpoint of a killed process is removed."""
    parameters, optimizer = small_run()
    (tmp_path / ".step-00000009.node7-0123abcd-17-89abcdef.tmp").mkdir()
    with CheckpointWriter(tmp_path, {}, keep=2) as writer:
        for number in (1, 2, 3, 4):
            writer.save(number, parameters, optimizer)
            step(parameters, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}, "nothing that loading could execute"


def full(*_) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "target",
    [
        "torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data",
        "engine.checkpoint.put_in_place",
    ],
)
def test_a_failed_write_is_raised_by_the_next_call(tmp_path: Path, monkeypatch, target: str):
    parameters, optimizer = small_run()
    with CheckpointWriter(tmp_path, {}, keep=2) as writer:
        writer.save(1, parameters, optimizer)

    monkeypatch.setattr(target, full)
    for call in ("save", "check", "end"):
        with pytest.raises(ValueError, match=r"step 2 could not be written \(No space.*step-00000001"):  # noqa: SIM117
            with CheckpointWriter(tmp_path, {}, keep=2) as writer:
                writer.save(2, parameters, optimizer)
                if call == "save":
                    writer.save(3, parameters, optimizer)
                elif call == "check":
                    while True:
                        writer.check()
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_the_runs_own_error_goes_before_a_failed_write(tmp_path: Path, monkeypatch):
    parameters, optimizer = small_run()
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(KeyError, match="the run's own"):  # noqa: SIM117
        with CheckpointWriter(tmp_path, {}, keep=2) as writer:
            writer.save(2, parameters, optimizer)
            raise KeyError("the run's own")
    assert not list(tmp_path.iterdir())


def test_a_programming_error_is_not_reported_as_a_full_disk(tmp_path: Path, monkeypatch):
    parameters, optimizer = small_run()
    monkeypatch.setattr("engine.checkpoint.put_in_place", None)
    with pytest.raises(TypeError, match="NoneType"):  # noqa: SIM117
        with CheckpointWriter(tmp_path, {}, keep=2) as writer:
            writer.save(2, parameters, optimizer)


def test_checkpoints_of_earlier_versions_are_refused(tmp_path: Path):
    old = tmp_path / "step-00000002"
    old.mkdir()
    save_file({"parameter/a": torch.zeros(3)}, old / "state.safetensors")
    (old / STATE_FILE).write_text('{"step": 2, "fingerprint": {}, "sha256": "0123"}')
    with pytest.raises(ResumeError, match=r"step-00000002 was written by an earlier version.*another --output"):
        check_resumable(tmp_path, {"seed": 0})


@pytest.mark.parametrize(
    "key, there, now",
    [("seed", 0, 1), ("data", "24 samples ab", "24 samples cd"), ("global batch", 8, 4), ("language model", "x", "y")],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path: Path, key, there, now):
    parameters, optimizer = small_run()
    same = {"seed": 0, "data": "d", "global batch": 8, "language model": "m"}
    with CheckpointWriter(tmp_path, {**same, key: there}, keep=1) as writer:
        writer.save(1, parameters, optimizer)
    saved, _ = newest_checkpoint(tmp_path)
    with pytest.raises(ResumeError, match=f"{key} was {there} there and is {now} now"):
        restore_checkpoint(saved, parameters, optimizer, {**same, key: now})


def save_steps(directory: Path, *steps: int, keep: int = 100, continued: Checkpoint | None = None) -> None:
    parameters, optimizer = small_run()
    with CheckpointWriter(directory, {"seed": 0}, keep, continued) as writer:
        for number in steps:
            writer.save(number, parameters, optimizer)


def truncate(checkpoint: Path) -> None:
    file = next(checkpoint.glob("model*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def other_bytes(checkpoint: Path) -> None:
    file = next(checkpoint.glob("model*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def without_a_file(checkpoint: Path) -> None:
    next(checkpoint.glob("model*.safetensors")).unlink()


def edit_state(**changes: object) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        content = json.loads((checkpoint / STATE_FILE).read_text())
        (checkpoint / STATE_FILE).write_text(json.dumps({**content, **changes}))

    return edit


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": truncate,
    "another byte": other_bytes,
    "a missing file": without_a_file,
    "state cut off": lambda checkpoint: (checkpoint / STATE_FILE).write_text('{"step": '),
    "state empty": lambda checkpoint: (checkpoint / STATE_FILE).write_bytes(b""),
    "state zeros": lambda checkpoint: (checkpoint / STATE_FILE).write_bytes(bytes(100)),
    "state missing": lambda checkpoint: (checkpoint / STATE_FILE).unlink(),
    "state a list": lambda checkpoint: (checkpoint / STATE_FILE).write_text("[1]"),
    "state of another step": edit_state(step=7),
    "state without checksums": edit_state(sha256={}),
    "state with other checksums": edit_state(sha256="0123"),
    "state with a list of checksums": edit_state(sha256=["0123"]),
}


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(tmp_path: Path, damage: Callable[[Path], object]):
    save_steps(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020")
    whole, (sentence,) = resume_point(tmp_path)
    assert whole == Checkpoint(tmp_path / "step-00000010", 10)
    assert f"checkpoint {tmp_path}/step-00000020 is damaged" in sentence
    assert sentence.endswith("set aside as damaged-step-00000020, falling back to step 10")
    assert steps_in(tmp_path) == ["damaged-step-00000020", "step-00000010"]
    assert resume_point(tmp_path) == (whole, []), "reported once"


@pytest.mark.parametrize("keep", [1, 2])
def test_retention_keeps_whole_checkpoints_and_damaged_ones(tmp_path: Path, keep: int):
    save_steps(tmp_path, 10, 20, 30)
    for name in ("step-00000020", "step-00000030"):
        truncate(tmp_path / name)
    whole, sentences = resume_point(tmp_path)
    assert len(sentences) == 2
    save_steps(tmp_path, 20, keep=keep, continued=whole)
    aside = ["damaged-step-00000020", "damaged-step-00000030"]
    assert steps_in(tmp_path) == [*aside, *["step-00000010", "step-00000020"][-keep:]]
    truncate(tmp_path / "step-00000020")
    if keep == 2:
        resume_point(tmp_path)
        assert steps_in(tmp_path) == [aside[0], "damaged-step-00000020-2", aside[1], "step-00000010"]


def test_an_older_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path):
    """Only the newest whole checkpoint is verified at the start; older ones may be damaged."""
    save_steps(tmp_path, 10, 20, 30)
    truncate(tmp_path / "step-00000020")
    whole, _ = resume_point(tmp_path)
    save_steps(tmp_path, 40, keep=3, continued=whole)
    assert "step-00000010" in steps_in(tmp_path)
    save_steps(tmp_path, 50, 60, keep=3, continued=newest_checkpoint(tmp_path)[0])
    assert steps_in(tmp_path) == [f"step-{step:08d}" for step in (40, 50, 60)]


def test_saving_does_not_verify_older_checkpoints_again(tmp_path: Path, monkeypatch):
    checked: list[Path] = []
    real = sha256
    monkeypatch.setattr("engine.checkpoint.sha256", lambda path: checked.append(path) or real(path))
    save_steps(tmp_path, 10, 20, 30, 40, keep=2)
    assert len({path.parent.name.partition(".step-")[2][:8] for path in checked}) == 4
    assert len(checked) == 4 * 2, "each of a checkpoint's two files once, when it is written"


def test_an_empty_folder_needs_no_flag(tmp_path: Path):
    assert resume_point(tmp_path) == (None, [])


def test_a_start_at_step_0_after_damage_to_all_checkpoints_needs_a_flag(tmp_path: Path):
    save_steps(tmp_path, 10, 20)
    truncate(tmp_path / "step-00000010")
    (tmp_path / "step-00000020" / STATE_FILE).unlink()
    for _ in range(2):
        with pytest.raises(ResumeError, match=rf"all checkpoints in {tmp_path} are damaged.*--start-over-if-damaged"):
            resume_point(tmp_path)
    assert steps_in(tmp_path) == ["step-00000010", "step-00000020"], "a user may repair them"
    whole, sentences = resume_point(tmp_path, start_over=True)
    assert whole is None and len(sentences) == 2 and all("starting at step 0" in s for s in sentences)
    with pytest.raises(ResumeError, match=r"damaged-step-00000020 among them.*--start-over-if-damaged"):
        resume_point(tmp_path)
    save_steps(tmp_path, 10, keep=1)
    assert resume_point(tmp_path) == (Checkpoint(tmp_path / "step-00000010", 10), [])
    assert steps_in(tmp_path) == ["damaged-step-00000010", "damaged-step-00000020", "step-00000010"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.ETIMEDOUT])
def test_a_checkpoint_that_cannot_be_reached_is_not_damaged(tmp_path: Path, monkeypatch, number: int):
    save_steps(tmp_path, 10)

    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("engine.checkpoint.sha256", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        resume_point(tmp_path)
    assert steps_in(tmp_path) == ["step-00000010"]


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_checkpoints_have_the_permissions_of_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        save_steps(tmp_path, 10)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
