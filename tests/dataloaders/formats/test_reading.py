"""All records of a file are read; the bad ones are named, within a failure budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataloaders.formats import Record, Where, read_all, read_each, read_pite
from dataloaders.records import RecordError, Sample
from tests.records import PITE, changed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Eight good records and two bad ones, on lines 3 and 6."""
    lines = [json.dumps({**PITE, "id": f"v{i}"}) for i in range(10)]
    lines[2] = json.dumps(changed(PITE, "meta.duration", "54.2"))
    lines[5] = lines[5].replace("a cat.", "a cat \\ud83d.")
    (tmp_path / "pite_143k.jsonl").write_text("\n".join(lines))
    return tmp_path / "pite_143k.jsonl"


def read(record: Record, where: Where) -> Sample:
    return read_pite(record, where, where.path.parent, num_frames=100, num_points=3)


def test_bad_records_are_named_and_the_others_read(file: Path) -> None:
    good, bad = read_all(file, read, 0.2)
    assert [sample.id for sample in good] == [f"v{i}" for i in (0, 1, 3, 4, 6, 7, 8, 9)]
    assert str(bad[0]) == f"{file}:3: field 'duration' must be int or float, not str"
    assert str(bad[1]).startswith(f"{file}:6: field 'conversations[1].value'") and len(bad) == 2


def test_above_the_budget_the_first_are_listed(file: Path) -> None:
    with pytest.raises(RecordError) as caught:
        read_all(file, read, 0.1)
    first, second, last = str(caught.value).splitlines()
    assert first.startswith(f"{file}:3: ") and second.startswith(f"{file}:6: ")
    assert last.startswith("2 of 10 records are malformed, more than the failure budget of 10.00%")


def test_a_bad_record_comes_with_what_is_known_of_it(file: Path) -> None:
    file.write_text(f'{{"id": "a"}}\nnull\n{json.dumps(PITE)}\n')
    found = [(record.get("id"), type(value)) for _, record, value in read_each(file, read)]
    assert found == [("a", RecordError), (None, RecordError), ("v000001", Sample)]


def test_a_file_that_ends_early_is_an_error_of_the_file(file: Path) -> None:
    file.write_text(json.dumps([PITE])[:-1])
    with pytest.raises(RecordError, match="ends before its closing bracket"):
        read_all(file, read, 1.0)
