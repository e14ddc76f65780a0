"""JSON files read record by record: all records, records by their offset, and errors of broken files with lines."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from dataloaders.formats import Where, iter_json, iter_raw, parse_json
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
        ("a.json", "[1, 2]", ":1:2", "expected a JSON object, not int"),
        ("a.json", '["x", {"a": 1}]', ":1:2", "expected a JSON object, not str"),
        ("a.json", '[{"a": 1}, "x"]', ":1:12", "expected a JSON object, not str"),
        ("a.json", "[[]]", ":1:2", "expected a JSON object, not list"),
        ("a.json", '[{"a": 1},]', ":1:10", "separated by commas"),
        ("a.json", '[{"a": 1} {"a": 2}]', ":1:10", "separated by commas"),
        ("a.json", '[{"a": 1},, {"a": 2}]', ":1:10", "separated by commas"),
        ("a.json", '[{"a": 1}] trailing [', ":1:21", "expected one JSON array"),
        ("a.json", 'text [{"a": 1}]', ":1:6", "expected one JSON array"),
        ("a.json", '[\n{"a": }\n]', ":2", "not valid JSON"),
        ("a.json", '{"k": [1]}', ":1:2", "expected a JSON object, not list"),
        ("a.json", '{"k": 1}', ":1:2", "expected a JSON object, not int"),
        ("a.json", '{"k": 1, "l": {"a": 1}}', ":1:2", "expected a JSON object, not int"),
        ("a.json", '{{"a": 1}}', ":1:2", "expected a key and a colon"),
        ("a.json", "\xff\xfe[\x00", ":1", "UTF-16; convert it to UTF-8"),
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


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_first_bytes_decide_not_the_name(tmp_path: Path, mark: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for content in (json.dumps(AWKWARD), json.dumps(AWKWARD, indent=2), f"\n {json.dumps(AWKWARD)}\n"):
        path.write_text(mark + content, encoding="utf-8")
        check(path, AWKWARD)
    for end in ("\n", "\r\n", "\n\n"):
        path.write_bytes((mark + "".join(json.dumps(r) + end for r in AWKWARD)).encode())
        check(path, AWKWARD)


def test_a_byte_order_mark_before_an_object_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for options in ({}, {"indent": 1}):
        path.write_text("\ufeff" + json.dumps({"k": {"a": 1}, "l": {"a": {}}}, **options), encoding="utf-8")
        check(path, [{"a": 1, "id": "k"}, {"a": {}, "id": "l"}])


def test_a_single_line_named_json(tmp_path: Path) -> None:
    record = {"id": "v", "meta": {"a": {}}, "more": [{}]}
    check(lines(tmp_path / "a.json", [record]), [record])


def test_entries_that_are_no_objects_are_refused_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    stray = ["null", '"a, b ] \\" {"', "[1, [2]]", "-1.5e3", "tru", "true"]
    path.write_text(f"[{stray[0]}, {stray[1]}, {{}}, {stray[2]} , {stray[3]},{stray[4]},\n{{}}, {stray[5]} ]")
    texts = [text.decode() for _, text in iter_raw(path)]
    assert texts == [*stray[:2], "{}", *stray[2:5], "{}", stray[5]]
    for offset, text in iter_raw(path):
        if text != b"{}":
            with pytest.raises(RecordError, match=r"a\.json:[12](:\d+)?: (expected a JSON object|not valid JSON)"):
                parse_json(text, Where(path, offset))


@pytest.mark.parametrize(
    "content", ["[1,,2]", '[1 {"a": 1}]', "[,1]", "[1,]", '[{"a": 1} 1]', '{"a": 1,}', '{"a": {} "b": 1}']
)
def test_wrong_commas(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=r"a\.json:1(:\d+)?: expected entries separated by commas"):
        list(iter_raw(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*nothing\.json: No such file"):
        list(iter_json(tmp_path / "nothing.json"))


def test_memory_is_that_of_a_record(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [{"text": "x" * 1000, "i": i} for i in range(4000)])
    peaks = []
    for _ in range(3):  # threads of other tests may allocate memory during one of them
        tracemalloc.start()
        assert sum(1 for _ in iter_json(path)) == 4000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < path.stat().st_size / 20


def test_a_last_line_that_is_cut_off_is_an_error_of_the_file(tmp_path: Path):
    """However large the failure budget; a whole last line needs no line break."""
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"a": {"b": 2}}')
    assert [record for _, _, record in iter_json(path)] == [{"a": 1}, {"a": {"b": 2}}]
    path.write_text('{"a": 1}\n{"a": {"b": 2}')
    with pytest.raises(
        RecordError, match=r"records.jsonl:2: the file ends in the middle of a record; was it cut off\?"
    ):
        list(iter_json(path))
    path.write_text('{"a": 1}\n{"a": {"b": 2}\n')
    with pytest.raises(RecordError, match=r"records\.jsonl:2: not valid JSON"):
        list(iter_json(path))
