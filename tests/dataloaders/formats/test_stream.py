"""JSON files read record by record: all records, records by their offset, and errors of broken files with lines."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from dataloaders.formats import Where, iter_json, parse_json
from dataloaders.records import RecordError

AWKWARD = [
    {"a": 'brackets ]}[{ and "quotes" \\ and \\"'},
    {"nested": {"deep": [{"x": [1, 2, {}]}, []]}, "empty": {}},
    {"unicode": "línea 🎈\n\t", "number": -1.5e-3, "none": None, "yes": True},
    {},
    {"\\": "\\\\"},
]


def written(path: Path, content: object, **options: object) -> Path:
    path.write_text(json.dumps(content, **options), encoding="utf-8")  # type: ignore[arg-type]
    return path


def lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def check(path: Path, expected: list) -> None:
    found = list(iter_json(path))
    assert [record for _, _, record in found] == expected
    for offset, length, record in found:
        assert parse_json(path.read_bytes()[offset : offset + length], path) == record


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_arrays_objects_and_lines(tmp_path: Path, options: dict) -> None:
    check(written(tmp_path / "array.json", AWKWARD, **options), AWKWARD)
    keyed = {f'v_"{i}"]': record for i, record in enumerate(AWKWARD)}
    check(written(tmp_path / "object.json", keyed, **options), [{**r, "id": k} for k, r in keyed.items()])
    check(lines(tmp_path / "lines.jsonl", AWKWARD), AWKWARD)


def test_empty_collections(tmp_path: Path) -> None:
    check(written(tmp_path / "a.json", []), [])
    check(written(tmp_path / "o.json", {}), [])
    check(lines(tmp_path / "l.jsonl", []), [])


def test_blank_lines_and_a_last_line_without_break(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}')
    check(path, [{"a": 1}, {"a": 2}])


def test_places(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [{"a": 1}, {"a": 2}], indent=1)
    first, second = (Where(path, offset) for offset, _, _ in iter_json(path))
    assert (str(first), str(second)) == (f"{path}:2:2", f"{path}:5:2")
    path = lines(tmp_path / "l.jsonl", [{"a": "é"}, {"a": 2}])
    assert [str(Where(path, offset)) for offset, _, _ in iter_json(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("name", "content", "place", "reason"),
    [
        ("a.json", '[{"a": 1}, {"a": 2}', ":1", "cut off"),
        ("a.json", '[{"a": 1},\n {"a": "no end', ":2", "cut off"),
        ("a.json", '[{"a": 1}\n, {"a": 2]', ":2", "not valid JSON"),
        ("a.json", "", ":1", "empty"),
        ("a.json", "   ", ":1", "cut off"),
        ("a.json", "[1, 2]", ":1:2", "expected an object"),
        ("a.json", '["x", {"a": 1}]', ":1:7", "expected an object"),
        ("a.json", '[{"a": 1}, "x"]', ":1:10", "expected an object"),
        ("a.json", "[[]]", ":1:2", "expected an object"),
        ("a.json", '[{"a": 1} {"a": 2}]', ":1:10", "separated by commas"),
        ("a.json", '[{"a": 1},, {"a": 2}]', ":1:10", "separated by commas"),
        ("a.json", '[{"a": 1}] trailing [', ":1:21", "expected one JSON array"),
        ("a.json", 'text [{"a": 1}]', ":1:6", "expected one JSON array"),
        ("a.json", '[\n{"a": }\n]', ":2", "not valid JSON"),
        ("a.json", '{"k": [1]}', ":1:7", "expected an object"),
        ("a.json", '{"k": 1}', ":1", "expected an object"),
        ("a.json", '{"k": 1, "l": {"a": 1}}', ":1", "expected"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', ":2", "not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', ":2", "expected a JSON object, not list"),
        ("a.jsonl", '{"a": "\xff"}\n', ":1", "not valid JSON"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "}\n", ":1", "not valid JSON"),
        ("a.jsonl", '{"a": ' + "9" * 5_000 + "}\n", ":1", "not valid JSON"),
        (
            "a.jsonl",
            '{"a": 1}\n{"b": [{"a": "x \\ud83d y"}]}\n',
            ":2",
            r"field 'b[0].a': \ud83d is half of a surrogate",
        ),
        ("a.jsonl", '{"id": "\\uDC00"}\n', ":1", r"field 'id': \udc00 is half of a surrogate"),
        ("a.jsonl", '{"\\ud83d\\ud83d": 1}\n', ":1", r"\ud83d is half of a surrogate"),
        ("a.jsonl", '{"a": "\xed\xa0\xbd"}\n', ":1", "not valid JSON"),
        ("a.json", '{"\\ud83d": {"a": 1}}', ":1", r"field 'id': \ud83d is half of a surrogate"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, place: str, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecordError) as caught:
        list(iter_json(path))
    assert str(caught.value).startswith(f"{path}{place}") and reason in str(caught.value)


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"a": "\\ud83c\\udf88", "b": "\\\\ud83d"}\n{"b": "\\u00e9 \\uD83C\\uDF88"}\n')
    check(path, [{"a": "🎈", "b": "\\ud83d"}, {"b": "é 🎈"}])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*nothing\.json: No such file"):
        list(iter_json(tmp_path / "nothing.json"))


def test_memory_is_that_of_a_record(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [{"text": "x" * 1000, "i": i} for i in range(4000)])
    tracemalloc.start()
    assert sum(1 for _ in iter_json(path)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 20
