"""PG-Video-LLaVA on two ranks: the losses and weights of one process, with copied and sharded weights, also after a kill."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.metrics import read_metrics
from engine.train import main
from tests.engine.distributed.ranks import train
from tests.engine.workspace import train_arguments

NUMBERS = ("loss", "ce", "gradient_norm", "learning_rate", "tokens")
FLAGS = {"family": "pg-video-llava", "video_first": "always", "epochs": 1, "token_budget": 130}
"""Questions about one video share its rows, and a rank has several micro-batches."""

KILLED = """
import os, signal, torch
step, count = torch.optim.AdamW.step, [0]
def killing(self, *rest):
    count[0] += 1
    if count[0] == 4: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *rest)
torch.optim.AdamW.step = killing"""


def numbers(output: Path) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in NUMBERS) for line in read_metrics(output / "stage3" / "metrics.jsonl")]


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "stage3" / "final" / "pite.safetensors")


@pytest.fixture(scope="module")
def outputs(pg_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process, and of two ranks with copied and with sharded weights."""
    root = tmp_path_factory.mktemp("outputs")
    runs = {name: root / name for name in ("one", "ddp", "fsdp")}
    assert main(train_arguments(pg_workspace, runs["one"], dtype="float32", **FLAGS)) == 0
    for parallel in ("ddp", "fsdp"):
        arguments = train_arguments(pg_workspace, runs[parallel], parallel=parallel, **FLAGS)
        ranks = train(2, root / f"logs-{parallel}", arguments)
        assert ranks.wait() == [0, 0], ranks.stderr(0)
        assert ("weights sharded over 2 (FSDP2)" in ranks.stderr(0)) == (parallel == "fsdp")
    return runs


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(outputs: dict[str, Path], parallel: str) -> None:
    assert len(numbers(outputs["one"])) == 6
    np.testing.assert_allclose(numbers(outputs[parallel]), numbers(outputs["one"]), rtol=1e-5)
    one, two = trained(outputs["one"]), trained(outputs[parallel])
    assert one.keys() == two.keys() and "model.vid_edges" in one
    for name in one:
        # AdamW's first steps have the size of the rate whatever the gradient, so rounding shows where it is near zero.
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=name)


def test_two_ranks_that_are_killed_resume_bitwise(pg_workspace: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    arguments = train_arguments(pg_workspace, tmp_path / "killed", parallel="ddp", **FLAGS)
    ranks = train(2, tmp_path / "logs", arguments, KILLED)
    assert ranks.wait() == [-signal.SIGKILL] * 2
    assert 0 < len(numbers(tmp_path / "killed")) < 6
    ranks = train(2, tmp_path / "logs", arguments)
    assert ranks.wait() == [0, 0], ranks.stderr(0)
    assert "continuing after step 2" in ranks.stderr(0)
    assert numbers(tmp_path / "killed") == numbers(outputs["ddp"])
    expected = trained(outputs["ddp"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(tmp_path / "killed").items())
