"""Two processes compute what one does: the global batch, its losses and the update."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import metrics
from engine.train import main
from tests.engine.workspace import train_arguments

ROOT = Path(__file__).parents[2]


def test_two_ranks_train_as_one(workspace: Path, tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(train_arguments(workspace, one, "1", dtype="float32")) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "engine.train",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *train_arguments(workspace, two, "1")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    alone, together = (metrics.read(output / "stage1" / "metrics.jsonl") for output in (one, two))
    assert len(alone) == len(together) == 6
    for a, b in zip(alone, together):
        assert a["tokens"] == b["tokens"]
        for name in ("loss", "ce", "l1", "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
    assert (two / "stage1" / "final" / "lineage.json").exists()
