"""The prediction log: what is read, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pite.evaluate.predictions import Prediction, PredictionWriter, read_lines, read_predictions
from pite.evaluate.questions import Question

RECORD = {"video_id": "v", "task": "grounding", "query_id": 0, "answer": "From 10 to 20.", "info": {"sentence_id": 0}}
FIRST = Prediction("v", "grounding", 0, "From 10 to 20.", {"sentence_id": 0})
SECOND = Prediction("w", "qa", "7/1", 'One\u2028line, "quoted",\r\nand an\u0085other \U0001f600.', {})


def line(**changes: Any) -> str:
    return json.dumps({**RECORD, **changes}, ensure_ascii=False)


def written(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_text("\n".join(lines) + end, encoding="utf-8", newline="")
    return path


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    for predictions in ([FIRST], [SECOND]):
        with PredictionWriter(tmp_path / "deep" / "p.jsonl") as log:
            log.append(predictions)
    assert read_predictions(tmp_path / "deep" / "p.jsonl") == [FIRST, SECOND]
    assert read_predictions(tmp_path / "deep" / "p.jsonl", "qa") == [SECOND]
    assert [str(each) for each in read_lines(tmp_path / "deep" / "p.jsonl", "qa")] == [f"{tmp_path}/deep/p.jsonl:2"]


def test_the_answer_to_a_question_has_its_key(tmp_path: Path) -> None:
    question = Question("v", "grounding", 0, "When?", {"sentence_id": 3})
    prediction = Prediction.of(question, "Then.", num_frames=8)
    assert prediction.key == question.key == ("v", "grounding", 0, 3)
    assert prediction.info == {"sentence_id": 3, "num_frames": 8}
    assert Question("v", "qa", 0, "What?").key == ("v", "qa", 0, None)


def test_logs_of_other_programs_are_read(tmp_path: Path) -> None:
    """A byte order mark, raw line separators inside an answer, Windows line ends, empty lines, missing fields."""
    short = {name: RECORD[name] for name in ("video_id", "answer")}
    lines = [
        "\ufeff" + line(),
        line(query_id=1, answer="One\u2028two\u0085three") + "\r",
        "",
        json.dumps({**short, "task": "captioning"}),
    ]
    found = read_predictions(written(tmp_path / "p.jsonl", *lines, end=""))
    assert [each.answer for each in found] == ["From 10 to 20.", "One\u2028two\u0085three", "From 10 to 20."]
    assert found[2].key == ("v", "captioning", 0, None)


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_line_that_a_kill_cut_off_is_left_out_and_removed(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "p.jsonl", line(), line(query_id=1)[:cut], end="")
    assert read_predictions(path) == [FIRST] and not caplog.text
    assert len(read_lines(path)) == 1
    assert "p.jsonl: the last line is cut off" in caplog.text
    with PredictionWriter(path) as log:
        log.append([SECOND])
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert read_predictions(path) == [FIRST, SECOND] and not caplog.records


def test_a_last_line_without_line_break_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", line(), end="")
    assert read_predictions(path) == [FIRST]
    with PredictionWriter(path) as log:
        log.append([SECOND])
    assert read_predictions(path) == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(video_id=["v"]), r"p\.jsonl:2: field 'video_id' must be a string, not \['v'\]"),
        (line(query_id=[0, 1]), r"p\.jsonl:2: field 'query_id' must be a whole number or a string, not \[0, 1\]"),
        (line(query_id=True), r"p\.jsonl:2: field 'query_id' must be a whole number or a string, not True"),
        (line(info={"sentence_id": [0]}), r"p\.jsonl:2: field 'info' must be an object whose sentence_id"),
        (line(info=3), r"p\.jsonl:2: field 'info' must be an object"),
        (line(answer=None), r"p\.jsonl:2: field 'answer' must be a string, not None"),
        ('{"task": "grounding"}', r"p\.jsonl:2: field 'video_id' is missing"),
        ("[1]", r"p\.jsonl:2: expected an object"),
        ('{"task": ', r"p\.jsonl:2: not valid JSON"),
        (line(answer="\\ud83d").replace("\\\\u", "\\u"), r"p\.jsonl:2: field 'answer': \\ud83d is half of a surrogate"),
        (line(video_id="x"), r"p\.jsonl:2: answers the same question as line 1"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_predictions(written(tmp_path / "p.jsonl", line(video_id="x"), text))


def test_malformed_lines_of_other_tasks_do_not_matter(tmp_path: Path) -> None:
    assert read_predictions(written(tmp_path / "p.jsonl", line(task="other", answer=["a"]), line()), "grounding") == [
        FIRST
    ]
