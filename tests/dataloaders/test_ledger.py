"""The failure ledger: written once, read after a kill, and strict about its budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataloaders.ledger import BudgetExceeded, Failure, Ledger, read_failures


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
        BudgetExceeded, match=r"3 of 200 media failed, more than the failure budget of 1\.00%; the last"
    ):
        ledger.add(failure(2))
    assert list(read_failures(ledger.path)) == [failure(i) for i in range(3)], "the last straw is written too"


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
def test_a_torn_line_spoils_no_other(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "f.jsonl"
    ledger = Ledger(path, 100, 0.5)
    ledger.add(failure(0))
    ledger.add(failure(1))
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    Ledger(path, 100, 0.5).add(failure(2))
    assert [f.id for f in read_failures(path)][-1] == "stage2/v2"
    assert failure(0) in read_failures(path)


def test_no_ledger(tmp_path: Path) -> None:
    assert list(read_failures(tmp_path / "f.jsonl")) == []
