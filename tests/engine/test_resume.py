"""A run that is killed at any moment and resumed equals the uninterrupted run bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataloaders import files
from engine.distributed.world import World
from engine.metrics import read_metrics
from engine.preemption import MARKER, write_marker
from engine.train import main
from tests import SOURCE_PATH
from tests.engine.distributed.ranks import train_alone
from tests.engine.workspace import train_arguments

ROOT = Path(__file__).parents[2]
NUMBERS = ("loss", "ce", "l1", "gradient_norm", "learning_rate", "tokens")


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A process as users start it, with slow steps."""
    program = f"import sys; exec({SLOWLY!r}); sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": SOURCE_PATH, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, stderr=subprocess.PIPE)


SLOWLY = """
import time
from engine import loop
compute = loop.compute_losses
loop.compute_losses = lambda *rest: (time.sleep(0.2), compute(*rest))[1]
from engine.train import main"""
"""Slow steps, so that a signal from outside reaches the run before it has ended."""


def wait_until(condition: Callable[[], bool], alive: Callable[[], bool], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert alive(), log()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def numbers(output: Path, stage: int = 1) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in NUMBERS) for line in read_metrics(output / f"stage{stage}" / "metrics.jsonl")]


def weights(output: Path, stage: int = 1) -> dict[str, torch.Tensor]:
    final = output / f"stage{stage}" / "final"
    return load_file(final / "adapter_model.safetensors") | load_file(final / "pite.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    assert main(train_arguments(workspace, output, "1")) == 0
    return output


def assert_equal_runs(output: Path, reference: Path, stage: int = 1) -> None:
    assert numbers(output, stage) == numbers(reference, stage)
    expected = weights(reference, stage)
    for name, tensor in weights(output, stage).items():
        assert torch.equal(tensor, expected[name]), name


def send_sigterm_in_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one optimizer step, counted over all stages from now on, send SIGTERM to this process."""
    step, steps = torch.optim.AdamW.step, []

    def signalling(self, *rest):
        steps.append(self)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalling)


def test_sigterm_in_a_stages_last_step_ends_the_run_after_it(workspace: Path, tmp_path: Path, monkeypatch, capsys):
    send_sigterm_in_step(6, monkeypatch)
    assert main(train_arguments(workspace, tmp_path)) == 0
    assert "stopping before the next stage, as requested" in capsys.readouterr().err
    assert json.loads((tmp_path / MARKER).read_text()) == {"stage": 1, "step": 6}
    assert (tmp_path / "stage1" / "final").exists() and not (tmp_path / "stage2" / "checkpoints").exists()
    assert main(train_arguments(workspace, tmp_path)) == 0
    assert (tmp_path / "stage3" / "final").exists() and not (tmp_path / MARKER).exists()


def test_sigterm_in_the_last_step_of_the_last_stage_leaves_no_marker(workspace: Path, tmp_path: Path, monkeypatch):
    send_sigterm_in_step(6, monkeypatch)
    assert main(train_arguments(workspace, tmp_path, "1")) == 0
    assert (tmp_path / "stage1" / "final").exists() and not (tmp_path / MARKER).exists()


# Each program kills itself at a moment that a signal from outside would rarely hit.
MOMENTS = {
    "while the tensors of a checkpoint are written": """
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
write = HuggingFaceStorageWriter.write_data
def killing(self, *rest):
    written = write(self, *rest)
    if "00000004" in str(self.path):
        for file in self.path.iterdir(): os.truncate(file, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    return written
HuggingFaceStorageWriter.write_data = killing""",
    "between a checkpoint's tensors and its rename": """
from dataloaders import files
sync = files.sync
def killing(path):
    sync(path)
    if path.name.startswith(".step-00000004."): os.kill(os.getpid(), signal.SIGKILL)
files.sync = killing""",
    "between the copy of a state and its writing": """
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
prepare = HuggingFaceStorageWriter.prepare_local_plan
def killing(self, plan):
    if "00000004" in str(self.path): os.kill(os.getpid(), signal.SIGKILL)
    return prepare(self, plan)
HuggingFaceStorageWriter.prepare_local_plan = killing""",
    "in the middle of a backward pass": """
from engine import loop
step = torch.optim.AdamW.step
count = [0]
def killing(self, *rest):
    count[0] += 1
    if count[0] == 4: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *rest)
torch.optim.AdamW.step = killing""",
    "while the finished stage is exported": """
from pite import checkpoint
save = checkpoint.save_stage
def killing(model, directory, lineage):
    save(model, directory, lineage)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_stage = killing""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(workspace: Path, tmp_path: Path, uninterrupted: Path, moment: str):
    log, code = tmp_path / "log", f"import os, signal, torch{MOMENTS[moment]}"
    process = train_alone(log, train_arguments(workspace, tmp_path, "1"), code)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert not (tmp_path / "stage1" / "final").exists()
    assert main(train_arguments(workspace, tmp_path, "1")) == 0
    assert_equal_runs(tmp_path, uninterrupted)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_from_outside(workspace: Path, tmp_path: Path, uninterrupted: Path, step: int):
    log = tmp_path / "log"
    process = train_alone(log, train_arguments(workspace, tmp_path, "1"), SLOWLY)
    wait_until(lambda: len(numbers(tmp_path)) >= step, process.is_alive, log.read_text)
    process.kill()
    process.join()
    assert not (tmp_path / "stage1" / "final").exists()
    assert main(train_arguments(workspace, tmp_path, "1")) == 0
    assert_equal_runs(tmp_path, uninterrupted)


def test_preemption_saves_and_exits_cleanly(workspace: Path, tmp_path: Path, uninterrupted: Path):
    process = start(train_arguments(workspace, tmp_path, "1", checkpoint_every=1000))
    wait_until(
        lambda: len(numbers(tmp_path)) >= 1, lambda: process.poll() is None, lambda: process.stderr.read().decode()
    )
    assert not (tmp_path / MARKER).exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    saved = int(next((tmp_path / "stage1" / "checkpoints").iterdir()).name.removeprefix("step-"))
    assert json.loads((tmp_path / MARKER).read_text()) == {"stage": 1, "step": saved}
    error = process.stderr.read().decode()
    assert "the same command continues" in error
    assert "torch.distributed" not in error, "a warning of torch for programmers"
    assert not (tmp_path / "stage1" / "final").exists()
    assert main(train_arguments(workspace, tmp_path, "1", checkpoint_every=1000)) == 0
    assert_equal_runs(tmp_path, uninterrupted)
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("how", ["malformed data", "no data", "another seed", "--max-steps", "no device", "finished"])
def test_only_a_preemption_leaves_a_marker(workspace: Path, tmp_path: Path, monkeypatch, how: str):
    """After an error, or a stop by --max-steps, a job does not queue itself again."""
    assert main(train_arguments(workspace, tmp_path, "1", max_steps=2)) == 0
    assert not (tmp_path / MARKER).exists()
    write_marker(tmp_path, 1, 2)
    flags, status = {
        "malformed data": ({"data": tmp_path / "data"}, 1),
        "no data": ({"data": tmp_path / "nothing"}, 1),
        "another seed": ({"seed": 1}, 1),
        "--max-steps": ({"max_steps": 4}, 0),
        "no device": ({}, 1),
        "finished": ({}, 0),
    }[how]
    if how == "malformed data":
        shutil.copytree(workspace / "data", tmp_path / "data", symlinks=True)
        (tmp_path / "data" / "stage1" / "localized_narratives.jsonl").write_text("{")
    if how == "no device":
        monkeypatch.setattr(World, "join", lambda *_: (_ for _ in ()).throw(ValueError("no device")))
    assert main(train_arguments(workspace, tmp_path, "1", **flags)) == status
    assert not (tmp_path / MARKER).exists()


def test_a_damaged_newest_checkpoint_falls_back(workspace: Path, tmp_path: Path, uninterrupted: Path, capsys):
    assert main(train_arguments(workspace, tmp_path, "1")) == 0
    shutil.rmtree(tmp_path / "stage1" / "final")
    newest = next((tmp_path / "stage1" / "checkpoints" / "step-00000006").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-7])
    assert main(train_arguments(workspace, tmp_path, "1")) == 0
    error = capsys.readouterr().err
    assert "step-00000006 is damaged" in error
    assert "set aside as damaged-step-00000006, falling back to step 4" in error
    assert "continuing after step 4" in error
    assert_equal_runs(tmp_path, uninterrupted)


def test_a_start_after_damage_to_all_checkpoints_needs_a_flag(
    workspace: Path, tmp_path: Path, uninterrupted: Path, capsys
):
    assert main(train_arguments(workspace, tmp_path, "1", max_steps=4)) == 0
    checkpoints = tmp_path / "stage1" / "checkpoints"
    for checkpoint in checkpoints.iterdir():
        next(checkpoint.glob("*.safetensors")).write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for _ in range(2):
        assert main(train_arguments(workspace, tmp_path, "1")) == 1
        error = capsys.readouterr().err
        assert f"engine.train: all checkpoints in {checkpoints} are damaged" in error
        assert "--start-over-if-damaged" in error
        assert sorted(tmp_path.rglob("*")) == before
    assert main(train_arguments(workspace, tmp_path, "1", start_over_if_damaged=True)) == 0
    assert "set aside as damaged-step-00000004, starting at step 0" in capsys.readouterr().err
    assert_equal_runs(tmp_path, uninterrupted)
    names = ["damaged-step-00000002", "damaged-step-00000004", "step-00000004", "step-00000006"]
    assert sorted(path.name for path in checkpoints.iterdir()) == names


def test_a_full_disk_keeps_the_checkpoint_before(workspace: Path, tmp_path: Path, uninterrupted: Path, capsys):
    """On a real file system of 3 MB, if this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        assert main(train_arguments(workspace, disk, "1", max_steps=2)) == 0
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(free - 100_000))
        capsys.readouterr()
        assert main(train_arguments(workspace, disk, "1")) == 1
        error = capsys.readouterr().err
        assert "checkpoint of step 4 could not be written (No space left on device)" in error
        assert "the last whole one is" in error
        assert [p.name for p in (disk / "stage1" / "checkpoints").iterdir()] == ["step-00000002"]
        (disk / "ballast").unlink()
        assert main(train_arguments(workspace, disk, "1")) == 0
        assert_equal_runs(disk, uninterrupted)
    finally:
        # Lazy unmount: this process may still have mapped files open.
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_write_that_fails_leaves_no_trace(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("whole")

    def write() -> None:
        with files.directory_written_atomically(tmp_path / "target") as temporary:
            (temporary / "new").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "old").read_text() == "whole"
