"""Checkpoints are written while training goes on, and hold the moment they were asked for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

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
    write = state.write_tensors

    def waiting(*arguments) -> None:
        assert may_write.wait(30)
        write(*arguments)

    monkeypatch.setattr(state, "write_tensors", waiting)
    with state.Writer(tmp_path, {"seed": 0}, keep=2) as writer:
        writer.save(1, parameters, optimizer)
        step(parameters, optimizer)
        writer.check()
        assert state.newest(tmp_path) == (None, [])
        may_write.set()
    found, complaints = state.newest(tmp_path)
    assert found is not None and found.step == 1 and not complaints
    saved = load_file(found.path / state.TENSORS)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    state.restore(found, parameters, optimizer, {"seed": 0})
    assert all(torch.equal(t, expected[n]) for n, t in state.tensors_of(parameters, optimizer).items())


def test_one_after_the_other_and_the_oldest_go(tmp_path: Path):
    parameters, optimizer = small_run()
    with state.Writer(tmp_path, {}, keep=2) as writer:
        for number in (1, 2, 3, 4):
            writer.save(number, parameters, optimizer)
            step(parameters, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_failed_write_surfaces_at_the_next_word(tmp_path: Path, monkeypatch):
    parameters, optimizer = small_run()
    with state.Writer(tmp_path, {}, keep=2) as writer:
        writer.save(1, parameters, optimizer)

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write_tensors", fail)
    for speak in ("save", "check", "end"):
        with pytest.raises(ValueError, match=r"step 2 could not be written \(No space.*step-00000001"):  # noqa: SIM117
            with state.Writer(tmp_path, {}, keep=2) as writer:
                writer.save(2, parameters, optimizer)
                if speak == "save":
                    writer.save(3, parameters, optimizer)
                elif speak == "check":
                    while True:
                        writer.check()


@pytest.mark.parametrize(
    "key, there, now",
    [("seed", 0, 1), ("data", "24 samples ab", "24 samples cd"), ("global batch", 8, 4), ("language model", "x", "y")],
)
def test_another_run_is_refused_by_name(tmp_path: Path, key, there, now):
    parameters, optimizer = small_run()
    same = {"seed": 0, "data": "d", "global batch": 8, "language model": "m"}
    saved = state.save(tmp_path, 1, state.tensors_of(parameters, optimizer), {**same, key: there}, keep=1)
    with pytest.raises(state.ResumeError, match=f"{key} was {there} there and is {now} now"):
        state.restore(saved, parameters, optimizer, {**same, key: now})
