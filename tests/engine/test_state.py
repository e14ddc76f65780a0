"""Checkpoints are written while training goes on, and hold the moment they were asked for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from engine import state


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
    expected = {name: tensor.clone() for name, tensor in state.tensors_of(parameters, optimizer).items()}
    may_write = threading.Event()
    write = HuggingFaceStorageWriter.write_data

    def waiting(self, *rest):
        assert may_write.wait(30)
        return write(self, *rest)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", waiting)
    monkeypatch.setattr(state, "FILE_BYTES", 100)
    with state.Writer(tmp_path, {"seed": 0}, keep=2) as writer:
        writer.save(1, parameters, optimizer)
        step(parameters, optimizer)
        writer.check()
        assert state.newest(tmp_path) == (None, [])
        may_write.set()
    found, complaints = state.newest(tmp_path)
    assert found is not None and found.step == 1 and not complaints
    files = [load_file(path) for path in found.path.glob("*.safetensors")]
    assert len(files) == 3
    saved = {name: tensor for file in files for name, tensor in file.items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    fresh = {name: nn.Parameter(torch.zeros_like(parameter)) for name, parameter in parameters.items()}
    other = torch.optim.AdamW(fresh.values(), lr=0.1, fused=True)
    for one, theirs in ((parameters, optimizer), (fresh, other)):
        state.restore(found, one, theirs, {"seed": 0})
        assert all(torch.equal(t, expected[n]) for n, t in state.tensors_of(one, theirs).items())


def test_one_after_the_other_and_the_oldest_go(tmp_path: Path):
    """Also what a process left unfinished that was killed."""
    parameters, optimizer = small_run()
    (tmp_path / ".step-00000009.tmp").mkdir()
    with state.Writer(tmp_path, {}, keep=2) as writer:
        for number in (1, 2, 3, 4):
            writer.save(number, parameters, optimizer)
            step(parameters, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}, "nothing that loading could execute"


def full(*_) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("owner, name", [(HuggingFaceStorageWriter, "write_data"), (state, "put_in_place")])
def test_a_failed_write_surfaces_at_the_next_word(tmp_path: Path, monkeypatch, owner, name):
    parameters, optimizer = small_run()
    with state.Writer(tmp_path, {}, keep=2) as writer:
        writer.save(1, parameters, optimizer)

    monkeypatch.setattr(owner, name, full)
    for speak in ("save", "check", "end"):
        with pytest.raises(ValueError, match=r"step 2 could not be written \(No space.*step-00000001"):  # noqa: SIM117
            with state.Writer(tmp_path, {}, keep=2) as writer:
                writer.save(2, parameters, optimizer)
                if speak == "save":
                    writer.save(3, parameters, optimizer)
                elif speak == "check":
                    while True:
                        writer.check()
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_what_ended_the_run_is_told_first(tmp_path: Path, monkeypatch):
    parameters, optimizer = small_run()
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(KeyError, match="the run's own"):  # noqa: SIM117
        with state.Writer(tmp_path, {}, keep=2) as writer:
            writer.save(2, parameters, optimizer)
            raise KeyError("the run's own")
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch):
    parameters, optimizer = small_run()
    monkeypatch.setattr(state, "put_in_place", None)
    with pytest.raises(TypeError, match="NoneType"):  # noqa: SIM117
        with state.Writer(tmp_path, {}, keep=2) as writer:
            writer.save(2, parameters, optimizer)


def test_the_layout_of_earlier_versions_is_refused(tmp_path: Path):
    old = tmp_path / "step-00000002"
    old.mkdir()
    save_file({"parameter/a": torch.zeros(3)}, old / "state.safetensors")
    (old / state.STATE).write_text('{"step": 2, "fingerprint": {}, "sha256": "0123"}')
    with pytest.raises(state.ResumeError, match=r"step-00000002 was written by an earlier version.*another --output"):
        state.check_newest(tmp_path, {"seed": 0})


@pytest.mark.parametrize(
    "key, there, now",
    [("seed", 0, 1), ("data", "24 samples ab", "24 samples cd"), ("global batch", 8, 4), ("language model", "x", "y")],
)
def test_another_run_is_refused_by_name(tmp_path: Path, key, there, now):
    parameters, optimizer = small_run()
    same = {"seed": 0, "data": "d", "global batch": 8, "language model": "m"}
    with state.Writer(tmp_path, {**same, key: there}, keep=1) as writer:
        writer.save(1, parameters, optimizer)
    saved, _ = state.newest(tmp_path)
    with pytest.raises(state.ResumeError, match=f"{key} was {there} there and is {now} now"):
        state.restore(saved, parameters, optimizer, {**same, key: now})
