"""Ranks that do not run the same thing are refused before the first step, with the first difference."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.engine.distributed.ranks import Ranks, launch, train
from tests.engine.workspace import train_arguments


def run(arguments: list[str], differs: list[str]) -> int:
    """engine.train with further arguments on rank 1."""
    import torch

    from engine.train import main

    torch.set_num_threads(1)
    return main([*arguments, *(differs if os.environ["RANK"] == "1" else [])])


def refusal(ranks: Ranks, output: Path) -> str:
    """The one sentence of a run that both ranks refuse before any step."""
    assert ranks.wait(60) == [1, 1], ranks.stderr(0)
    assert not (output / "stage1" / "metrics.jsonl").exists()
    texts = [ranks.stderr(rank) for rank in range(2)]
    assert not any("Traceback" in text for text in texts), texts
    (sentence,) = (line for text in texts for line in text.splitlines() if line.startswith("engine.train:"))
    assert "rank 1 (" in sentence and "does not run what rank 0 (" in sentence
    return sentence


@pytest.mark.parametrize("differs, words", [
    (["--seed", "1"], "flags.seed is 1 on rank 1 and 0 on rank 0"),
    (["--learning-rate", "1e-3"], "flags.learning-rate is 0.001 on rank 1 and None on rank 0"),
    (["--max-steps", "3"], "flags.max-steps is 3 on rank 1 and None on rank 0"),
    (["--frozen-dtype", "fp8"], "flags.frozen-dtype is fp8 on rank 1 and None on rank 0"),
    (["--stage", "all"], "flags.stage is all on rank 1 and 1 on rank 0"),
    (["--llm", "random", "--recompute", "1"], "flags.recompute is 1 on rank 1 and None on rank 0"),
    (["--token-budget", "700"], "flags.token-budget is 700 on rank 1 and 600 on rank 0"),
])  # fmt: skip
def test_other_flags(workspace: Path, tmp_path: Path, differs: list[str], words: str):
    arguments = train_arguments(workspace, tmp_path / "run", "1")
    assert words in refusal(launch(2, tmp_path, run, arguments, differs), tmp_path / "run")


def test_other_data(workspace: Path, tmp_path: Path):
    """A host has its own copy of the annotations, with a record less."""
    shutil.copytree(workspace / "data", tmp_path / "data", symlinks=True)
    file = tmp_path / "data" / "stage1" / "localized_narratives.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    arguments = train_arguments(workspace, tmp_path / "run", "1")
    differs = ["--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache")]
    sentence = refusal(launch(2, tmp_path, run, arguments, differs), tmp_path / "run")
    assert "data is 23 samples" in sentence and "and 24 samples" in sentence


OTHER_CODE = """
from engine import agreement
checksum = agreement._checksum_of_code
agreement._checksum_of_code = lambda package: f"{checksum(package)} edited" if rank == 1 else checksum(package)"""

OTHER_WEIGHTS = """
from engine import run
make = run.make_optimizer
def changed(model, recipe):
    if rank == 1: next(iter(dict(model.trainable()).values())).data.view(-1)[5] += 1e-6
    return make(model, recipe)
run.make_optimizer = changed"""


def test_other_code(workspace: Path, tmp_path: Path):
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path / "run", "1"), OTHER_CODE)
    assert "code.dataloaders is " in refusal(ranks, tmp_path / "run")


def test_other_start_values(workspace: Path, tmp_path: Path):
    """One number of one parameter differs in its last bits."""
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path / "run", "1"), OTHER_WEIGHTS)
    assert "after step 0, the checksum of the parameter " in refusal(ranks, tmp_path / "run")


OTHER_ADAPTER = """
from engine import build
align = build.align_adapter
def other(model, *rest):
    assert rank == 0
    align(model, *rest)
build.align_adapter = other"""


def test_rank_0_computes_the_start_values_of_the_adapter(workspace: Path, tmp_path: Path):
    """The other ranks get them: another kind of CPU would compute other last bits, which the checksum refuses."""
    arguments = train_arguments(workspace, tmp_path / "run", "1", max_steps=1)
    ranks = train(2, tmp_path / "logs", arguments, OTHER_ADAPTER)
    assert ranks.wait(60) == [0, 0], ranks.stderr(1)
    assert not list((tmp_path / "run").glob(".shared-*"))


NOT_SHARED = """
from engine import preflight
preflight.SHARED_SECONDS = 0.5
check = preflight.check_shared
if rank == 1: preflight.check_shared = lambda output, *rest: check(output / "local", *rest)"""


def test_an_output_folder_that_hosts_do_not_share(workspace: Path, tmp_path: Path):
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path / "run", "1"), NOT_SHARED)
    assert ranks.wait(60) == [1, 1]
    texts = [ranks.stderr(rank) for rank in range(2)]
    (sentence,) = (line for text in texts for line in text.splitlines() if line.startswith("engine.train:"))
    assert "rank 1 (" in sentence and "is not the folder that rank 0 writes to" in sentence
    assert not (tmp_path / "run" / "stage1" / "metrics.jsonl").exists()


def test_missing_operators_and_versions_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from engine import agreement

    assert agreement._versions().keys() >= {"torch", "triton", "flash-attn"}
    assert agreement._version_of("no-such-distribution") is None and agreement._version_of("torch")
    package = tmp_path / "pite_kernels" / "__init__.py"
    package.parent.mkdir()
    monkeypatch.setattr(agreement, "import_module", lambda name: SimpleNamespace(__file__=str(package)))
    assert agreement._checksum_of_operators() == "none"
    (package.parent / "_C.so").write_bytes(b"compiled")
    assert len(agreement._checksum_of_operators()) == 16


DRIFT = """
from engine import run
add, made = run.Reporter.add, []
make = run.make_optimizer
run.make_optimizer = lambda model, recipe: made.append(model) or make(model, recipe)
def drifting(self, result, now):
    if rank == 1 and result.step == 2: next(iter(dict(made[0].trainable()).values())).data.view(-1)[0] += 1
    return add(self, result, now=now)
run.Reporter.add = drifting"""


def test_weights_that_drift_apart_are_found_at_the_next_checkpoint(workspace: Path, tmp_path: Path):
    arguments = train_arguments(workspace, tmp_path / "run", "1", checkpoint_every=3)
    ranks = train(2, tmp_path / "logs", arguments, DRIFT)
    assert ranks.wait(60) == [1, 1]
    errors = [line for rank in range(2) for line in ranks.stderr(rank).splitlines() if "engine.train:" in line]
    assert len(errors) == 1 and "after step 3, the checksum of the parameter " in errors[0]
    assert not list((tmp_path / "run" / "stage1" / "checkpoints").glob("step-*")), "nothing wrong is saved"


def test_the_checksum_sees_every_element():
    import torch

    from engine.agreement import _sum_of_bits

    parameter = torch.zeros(70_000)
    for position in (0, 65_519, 65_520, 65_521, 69_999):
        changed = parameter.clone()
        changed[position] = 1e-30
        assert _sum_of_bits(changed) != _sum_of_bits(parameter)
