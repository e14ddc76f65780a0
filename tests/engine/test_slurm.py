"""The job script of docs/training.md, with Slurm's commands and torchrun replaced by small test programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.preemption import MARKER
from tests import SOURCE_PATH
from tests.engine.workspace import train_arguments

ROOT = Path(__file__).parents[2]

SRUN = """#!/bin/bash
[[ $1 == --cpus-per-task=64 && $2 == --kill-on-bad-exit=1 ]] || exit 99
shift 2
[[ $MODE == preempted ]] && kill -TERM $PPID
exec "$@"
"""

SCONTROL = """#!/bin/bash
case $1 in
show) printf "node1\\nnode2\\n" ;;
requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""

TORCHRUN = """#!{python}
import os, signal, sys
import torch
from engine.train import main

given = sys.argv[1:]
assert given[: given.index("-m")] == [
    "--nnodes", "2", "--nproc-per-node", "8",
    "--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29500", "--rdzv-id", "17",
], given
assert float(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30
output = given[given.index("--output") + 1]
step, steps = torch.optim.AdamW.step, []

def preempted(self, *rest):
    steps.append(self)
    if len(steps) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *rest)

if os.environ["MODE"] == "preempted":
    torch.optim.AdamW.step = preempted
status = main([*{arguments}, "--output", output])
sys.exit(status or 143 * (os.environ["MODE"] == "preempted"))  # torchrun reports the signal, not its ranks' success
"""


def script() -> str:
    text = (ROOT / "docs" / "training.md").read_text()
    (found,) = (block for block in re.findall(r"```shell\n(.*?)```", text, re.DOTALL) if "#SBATCH" in block)
    assert isinstance(found, str)
    return found


@pytest.fixture
def job(workspace: Path, tmp_path: Path):
    """Runs the script in its own folder; returns its exit status and the jobs queued again so far."""
    programs = tmp_path / "bin"
    programs.mkdir()
    arguments = train_arguments(workspace, tmp_path, "1")
    at = arguments.index("--output")
    arguments[at : at + 2] = []
    torchrun = TORCHRUN.format(python=sys.executable, arguments=arguments)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script())
    requeued = tmp_path / "requeued"
    requeued.touch()
    slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64"}

    def run(mode: str) -> tuple[int, list[str]]:
        paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": SOURCE_PATH, "REQUEUED": str(requeued)}
        environment = {**os.environ, **slurm, **paths, "MODE": mode}
        status = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, timeout=300).returncode
        return status, requeued.read_text().split()

    return run


def test_only_a_preempted_job_queues_itself_again(job, tmp_path: Path):
    output = tmp_path / "runs" / "pite-13b"
    status, requeued = job("preempted")
    assert requeued == ["17"], "once"
    assert status == 143
    assert json.loads((output / MARKER).read_text()) == {"stage": 1, "step": 3}
    states = list((output / "stage1" / "checkpoints").glob("*/state.json"))
    whole = [state.read_text() for state in states]
    for state in states:
        state.write_text("{")
    status, requeued = job("resumed")
    assert status == 1 and requeued == ["17"], "not after an error, though the run before was preempted"
    for state, text in zip(states, whole):
        state.write_text(text)
    status, requeued = job("resumed")
    assert status == 0 and requeued == ["17"], "not when it is finished"
    assert (output / "stage1" / "final" / "lineage.json").exists() and not (output / MARKER).exists()


def test_a_job_whose_command_cannot_start_is_not_queued_again(job, tmp_path: Path):
    """Even if an earlier run left a marker."""
    output = tmp_path / "runs" / "pite-13b"
    output.mkdir(parents=True)
    (output / MARKER).write_text("{}")
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/bash\nexit 2\n")
    assert job("resumed") == (2, [])
