"""An error of all ranks is printed once, an error of one rank with its name, and no rank hangs."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

from dataloaders import cli
from engine.train import main
from tests.engine.distributed.ranks import Ranks, launch, train
from tests.engine.workspace import train_arguments

END_WITHIN = 90


def printed_lines(ranks: Ranks, sentence: str) -> list[str]:
    """The lines of all ranks that contain a sentence. No rank may print a traceback."""
    texts = [ranks.stderr(rank) for rank in range(len(ranks.logs))]
    assert not any("Traceback" in text for text in texts), texts
    return [line for text in texts for line in text.splitlines() if sentence in line]


def mistype(wrong: tuple[int, ...], started: str) -> int:
    """A wrong flag on some ranks; rank 0 is late."""
    rank = int(os.environ["RANK"])
    if rank == 0:
        time.sleep(1)
    cli.WAIT_SECONDS = 3.0
    Path(f"{started}.{rank}").touch()
    try:
        return main(["--learning-rat", "1"]) if rank in wrong else 0
    except SystemExit as end:
        return int(end.code or 0)


def test_a_wrong_flag_is_printed_once(tmp_path: Path):
    """torchrun ends all ranks as soon as one has ended, so the others let rank 0 print and end first."""
    ranks = launch(2, tmp_path, mistype, (0, 1), str(tmp_path / "started"))
    assert ranks.wait_like_torchrun(END_WITHIN) == [2, None]
    assert (tmp_path / "started.1").exists(), "rank 1 had the error first"
    (line,) = printed_lines(ranks, "there is no flag --learning-rat")
    assert line.startswith("engine.train: there is no flag")


def test_a_flag_that_is_wrong_on_one_node_is_printed_there(tmp_path: Path):
    ranks = launch(2, tmp_path, mistype, (1,), str(tmp_path / "started"))
    assert ranks.wait(END_WITHIN) == [0, 2]
    (line,) = printed_lines(ranks, "there is no flag --learning-rat")
    assert line.startswith("engine.train: rank 1 (")


def test_a_missing_path_is_printed_once(workspace: Path, tmp_path: Path):
    """Before the ranks join."""
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path, "1", data="nowhere"))
    assert ranks.wait_like_torchrun(END_WITHIN) == [1, None]
    assert len(printed_lines(ranks, "engine.train: --data nowhere")) == 1


def test_an_error_of_all_ranks_is_printed_once(workspace: Path, tmp_path: Path):
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path, "1", global_batch=100))
    assert ranks.wait(END_WITHIN) == [1, 1]
    assert len(printed_lines(ranks, "engine.train: stage 1: 24 samples do not fill")) == 1
    assert len(printed_lines(ranks, "engine.train:")) == 1


MISSING = """
import engine.train, engine.prepare
from engine import job
from dataloaders import cli
cli.WAIT_SECONDS = 0.1
def missing(*rest): raise FileNotFoundError("/scratch is not mounted")
if rank == 1: {} = missing"""


def test_an_error_of_one_rank_in_the_checks_is_raised_by_all(workspace: Path, tmp_path: Path):
    arguments = train_arguments(workspace, tmp_path, "1")
    ranks = train(2, tmp_path / "logs", arguments, MISSING.format("engine.train.check_paths = job.check_paths"))
    assert ranks.wait(END_WITHIN) == [1, 1]
    host = socket.gethostname()
    assert printed_lines(ranks, "engine.train:") == [f"engine.train: rank 1 ({host}): /scratch is not mounted"]


def test_a_later_error_of_one_rank_ends_the_others(workspace: Path, tmp_path: Path):
    arguments = train_arguments(workspace, tmp_path, "1")
    ranks = train(2, tmp_path / "logs", arguments, MISSING.format("engine.prepare.BatchPlan"))
    assert ranks.wait(END_WITHIN) == [1, 1]
    assert "engine.train: rank 1 (" in ranks.stderr(1)
    (message,) = printed_lines(ranks, "rank 0 ends: rank 1 (")
    assert "ended: /scratch is not mounted" in message


WITHOUT_LOCKS = """
import time
from dataloaders import locks
from dataloaders.samples import index
def refuse(*_): raise OSError(37, "No locks available")
locks.fcntl.flock = refuse
build = index._build
def counting(path, *rest):
    with open("BUILT", "a") as file: file.write(f"{rank}\\n")
    time.sleep(1)
    build(path, *rest)
index._build = counting"""


def test_one_rank_tokenizes_where_there_are_no_locks(workspace: Path, tmp_path: Path):
    """And one rank of each machine warns."""
    code = WITHOUT_LOCKS.replace("BUILT", str(tmp_path / "built"))
    arguments = train_arguments(workspace, tmp_path / "out", "1", cache=tmp_path / "cache", max_steps=1)
    ranks = train(3, tmp_path / "logs", arguments, code)
    assert ranks.wait(END_WITHIN) == [0, 0, 0], ranks.stderr(0)
    assert (tmp_path / "built").read_text() == "0\n"
    assert len(printed_lines(ranks, "is on a file system without locks")) == 2, "the run's folder and the cache"


def test_malformed_data_are_reported_once(workspace: Path, tmp_path: Path):
    """Rank 0 alone reads them, and all ranks end with its message."""
    data = tmp_path / "data"
    shutil.copytree(workspace / "data", data, symlinks=True)
    file = data / "stage1" / "localized_narratives.jsonl"
    file.write_text("{}\n" + file.read_text())
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path / "out", "1", data=data))
    assert ranks.wait(END_WITHIN) == [1, 1]
    assert len(printed_lines(ranks, "1 of 25 records are malformed")) == 1
    assert not printed_lines(ranks, "engine.train: rank 0")


def test_damaged_checkpoints_are_refused_on_all_ranks(workspace: Path, tmp_path: Path):
    arguments = train_arguments(workspace, tmp_path, "1")
    assert train(2, tmp_path / "logs", [*arguments, "--max-steps", "2"]).wait(END_WITHIN) == [0, 0]
    (checkpoint,) = (tmp_path / "stage1" / "checkpoints").iterdir()
    (checkpoint / "state.json").write_text("{")
    ranks = train(2, tmp_path / "logs", arguments)
    assert ranks.wait(END_WITHIN) == [1, 1]
    assert len(printed_lines(ranks, "--start-over-if-damaged")) == 1 and checkpoint.exists()
    ranks = train(2, tmp_path / "logs", [*arguments, "--start-over-if-damaged"])
    assert ranks.wait(END_WITHIN) == [0, 0]
    assert len(printed_lines(ranks, "set aside as damaged-step-00000002")) == 1
