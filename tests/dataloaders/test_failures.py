"""The failure ledger: written once, readable after a kill, with a strict budget."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dataloaders import failures as ledger_module
from dataloaders.failures import LEDGER, BudgetExceeded, Failure, Ledger, over_budget, read_failures, report
from dataloaders.store.__main__ import main
from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest


def failure(i: int, reason: str = "cut off") -> Failure:
    return Failure(f"stage2/v{i}", f"videos/v{i}.mp4", "decode", f"v{i}: {reason} — ü")


def test_failures_are_written_at_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "failures.jsonl", total=100, budget=0.5)
    for i in range(3):
        ledger.add(failure(i))
        assert list(read_failures(ledger.path)) == [failure(j) for j in range(i + 1)]
    assert ledger.count == 3


def test_budget(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "f.jsonl", total=200, budget=0.01)
    ledger.add(failure(0))
    ledger.add(failure(0))
    ledger.add(failure(1))
    with pytest.raises(
        BudgetExceeded,
        match=r"3 of 200 media failed, more than the failure budget of 1\.00%; add .* 0\.015 or more .*; the last",
    ):
        ledger.add(failure(2))
    assert list(read_failures(ledger.path)) == [failure(i) for i in range(3)], (
        "the failure that exceeds the budget is logged too"
    )


def test_more_than_half_is_not_left_out() -> None:
    """A wrong file, or a field of another name everywhere: a larger budget would leave out everything."""
    assert over_budget(3, 5, 0.01) == (
        "more than the failure budget of 1.00%, and more than half: check the files and their format"
    )


@pytest.mark.parametrize(
    ("failed", "total", "share"),
    [
        (2, 15, "0.14"),
        (3, 200, "0.015"),
        (1, 2, "0.5"),
        (1, 7_000, "0.00015"),
        (29, 100, "0.3"),  # 0.29 * 100 is below 29 in floating point
        (1, 3, "0.34"),
    ],
)
def test_the_budget_in_the_message_passes(tmp_path: Path, failed: int, total: int, share: str) -> None:
    assert f"; add --failure-budget {share} or more to leave them out" in over_budget(failed, total, 0.0)
    assert failed <= float(share) * total
    ledger = Ledger(tmp_path / LEDGER, total, float(share))
    for i in range(failed):
        ledger.add(failure(i))


def test_failures_that_another_process_logs_count(tmp_path: Path) -> None:
    """Also if it logged them before this ledger was opened."""
    first = Ledger(tmp_path / LEDGER, 100, 0.02)
    first.log([failure(0), failure(1), failure(1)])
    second = Ledger(tmp_path / LEDGER, 100, 0.02)
    second.count_elsewhere(failure(i).id for i in range(2))
    assert (first.count, second.count) == (2, 0) and len(list(read_failures(first.path))) == 2
    with pytest.raises(BudgetExceeded, match="3 of 100 media failed"):
        second.add(failure(2))


def test_no_budget(tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded):
        Ledger(tmp_path / "f.jsonl", total=100, budget=0.0).add(failure(0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Ledger(tmp_path / "f.jsonl", total=100, budget=5)


def test_the_next_run_counts_again(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    Ledger(path, 100, 0.01).add(failure(0))
    again = Ledger(path, 100, 0.01)
    assert again.count == 0, "the file may have been repaired since"
    again.add(failure(1))
    again.add(failure(1))
    assert again.count == 1
    assert list(read_failures(path)) == [failure(0), failure(1)]


def test_processes_share_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    Ledger(path, 100, 0.05).add(failure(0))
    one, two = Ledger(path, 100, 0.05), Ledger(path, 100, 0.05)
    for i in range(4):
        (one, two)[i % 2].add(failure(i))
    assert one.count == two.count == 2
    one.add(failure(4))
    with pytest.raises(BudgetExceeded, match="6 of 100 media failed"):
        two.add(failure(5))


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_line_does_not_affect_others(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "f.jsonl"
    ledger = Ledger(path, 100, 0.5)
    ledger.add(failure(0))
    ledger.add(failure(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    Ledger(path, 100, 0.5).add(failure(2))
    assert [f.id for f in read_failures(path)][-1] == "stage2/v2"
    assert failure(0) in read_failures(path)


def test_no_ledger(tmp_path: Path) -> None:
    assert list(read_failures(tmp_path / "f.jsonl")) == []
    Ledger(tmp_path / "f.jsonl", 100, 0.5)
    assert not list(tmp_path.iterdir()), "the file is created with the first failure"


def old_line(failure: Failure) -> str:
    """A line in the format of earlier versions, whose processes all wrote to one file."""
    return json.dumps(asdict(failure), ensure_ascii=False) + "\n"


def test_a_file_for_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for processes with the same id, and after earlier versions; read in order of time, not of names."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    path = tmp_path / "f.jsonl"
    path.write_text(old_line(failure(0)) + old_line(failure(1, "empty")))
    ledgers = [Ledger(path, 100, 0.5) for _ in range(4)]
    order = [2, 0, 3, 1, 0, 2, 1, 3]
    for number, which in enumerate(order):
        ledgers[which].add(failure(number, f"reason of process {which}"))
    assert len(list(tmp_path.iterdir())) == 5 and path.read_text().count("\n") == 2
    expected = [failure(0), failure(1, "empty")]
    expected += [failure(number, f"reason of process {which}") for number, which in enumerate(order)]
    assert list(read_failures(path)) == expected
    text = report(read_failures(path))
    assert text.startswith("8 media failed") and "empty" not in text, "each id counts with its last reason"


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tests.dataloaders.test_failures import failure\n"
        "from dataloaders.failures import Ledger\n"
        "ledger, first = Ledger(pathlib.Path(sys.argv[1]), 1000, 1.0), int(sys.argv[2])\n"
        "for i in range(first, first + 50): ledger.add(failure(i))"
    )
    path = tmp_path / "f.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), str(50 * n)]) for n in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert {f.id for f in read_failures(path)} == {failure(i).id for i in range(150)}


def test_lines_of_an_earlier_version_count(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(old_line(failure(0)))
    ledger = Ledger(path, 100, 0.02)
    with path.open("a") as file:
        file.write(old_line(failure(1)))
    ledger.add(failure(2))
    with path.open("a") as file:
        file.write(old_line(failure(3)))
    with pytest.raises(BudgetExceeded, match=r"3 of 100 media failed.*; all are in .*/f\*\.jsonl"):
        ledger.add(failure(2))


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_the_file_has_the_umasks_permissions(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        Ledger(tmp_path / LEDGER, 100, 0.5).add(failure(0))
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_report_counts_by_reason(tmp_path: Path) -> None:
    """Reasons that differ in names and numbers are one; an id counts once, and not if it was encoded since."""
    path = tmp_path / "videos/a 1.mp4"
    failures = [
        Failure("a1", str(path), "decode", f"{path}: it should hold 100 bytes and holds 50"),
        Failure("b", "b.mp4", "decode", "b.mp4: it should hold 7 bytes and holds 3.5"),
        Failure("c", "c.mp4", "decode", "c.mp4: the file is empty"),
        Failure("b", "b.mp4", "encode", "features of 'b' are not finite"),
        Failure("d", "d.mp4", "decode", "d.mp4: the file is empty"),
        Failure("e", "e.mp4", "decode", "e.mp4: the file is empty"),
    ]
    lines = report(failures, {"e"}).splitlines()
    assert lines[0] == "4 media failed, 1 more were encoded since"
    assert [(int(line[:8]), line[10:].partition("  (")[0]) for line in lines[1:]] == [
        (2, "decode  the file is empty"),
        (1, "decode  it should hold # bytes and holds #"),
        (1, "encode  features of '...' are not finite"),
    ]
    assert lines[2].endswith(f"(such as a1: {path})")


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(tmp_path / LEDGER, 100, 0.5)
    ledger.add(failure(0))
    ledger.add(failure(1))
    store = FeatureStore.create_or_open(tmp_path / "videos", Manifest("e", 1, "s", "p", 1, 4))
    with FeatureWriter(store) as writer:
        writer.add({"stage2/v1": np.zeros((1, 4))})
    assert main(["failures", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("1 media failed, 1 more were encoded since\n")
    assert main(["failures", str(tmp_path / "nothing")]) == 1 and "no such folder" in capsys.readouterr().err


def test_a_failure_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a ledger of thousands again with each failure would take minutes."""
    ledger, other = (Ledger(tmp_path / LEDGER, 10**6, 1) for _ in range(2))
    seen: list[Failure] = []
    real = ledger_module.Failure
    for i in range(20):
        other.add(failure(i))
        with monkeypatch.context() as patch:
            patch.setattr(ledger_module, "Failure", lambda **values: seen.append(real(**values)) or seen[-1])
            ledger.add(failure(100 + i))
    assert seen == [failure(i) for i in range(20)]
