"""Malformed records of held-out trajectories are counted within a failure budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pite.evaluate.__main__ import main
from tests.commands import status_of
from tests.held_out import make_held_out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out videos; two more records are malformed."""
    root = make_held_out(tmp_path_factory.mktemp("made"))
    path = root / "data/evaluation/pite_143k.jsonl"
    records = path.read_text().splitlines()
    (root / "whole.jsonl").write_text("\n".join(records))
    broken = {**json.loads(records[0]), "id": "../x"}
    lines = [records[0], '{"id": "y", "conversations"', *records[1:], json.dumps(broken)]
    path.write_text("".join(line + "\n" for line in lines))
    return root


def evaluated(made: Path, *more: str) -> int:
    where = ["--model", f"{made}/model", "--data", f"{made}/data", "--store", f"{made}/store", "--device", "cpu"]
    return status_of(main, ["trajectories", *where, *more])


def test_malformed_records_are_left_out_and_counted(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(made, "--failure-budget", "0.5", "--metrics", f"{tmp_path}/m.json") == 0
    printed = capsys.readouterr().out
    count = len((made / "whole.jsonl").read_text().splitlines())
    assert f"2 of {count + 2} records are malformed, such as {made}/data/evaluation/pite_143k.jsonl:2: " in printed
    assert json.loads((tmp_path / "m.json").read_text())["trajectories"]["malformed records"] == 2
    path = made / "data/evaluation/pite_143k.jsonl"
    with_errors = path.read_text()
    path.write_text((made / "whole.jsonl").read_text())
    assert evaluated(made) == 0
    path.write_text(with_errors)
    whole = capsys.readouterr().out
    assert printed.startswith(whole.rstrip("\n"))


def test_more_than_the_budget_ends_the_command(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(made) == 1
    *_, first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"pite.evaluate: {made}/data/evaluation/pite_143k.jsonl:2: not valid JSON")
    assert "field 'id' holds '../x', which cannot name a media file" in second
    assert "records are malformed, more than the failure budget of 1.00%; add --failure-budget 0." in last
    assert evaluated(made, "--failure-budget", "2") == 2
