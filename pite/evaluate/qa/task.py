"""The questions of a benchmark, and the answers to them in a prediction log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pite.evaluate.predictions import Prediction, read_lines
from pite.evaluate.qa.benchmarks import Benchmark, Item
from pite.evaluate.questions import Question

QUESTION = "{}"
MAX_NEW_TOKENS = 1024

Answers = Mapping[tuple[str, str], str]
"""The answer to a question by its video and query id, which is a text here: some programs write numbers as texts."""


def questions(items: Sequence[Item], benchmark: Benchmark, template: str = QUESTION) -> list[Question]:
    """The questions of all items, in order. `{}` in the template is replaced by the question."""
    return [
        Question(item.video, benchmark, query, template.replace("{}", text))
        for item in items
        for query, text in zip(item.query_ids, item.questions, strict=True)
    ]


def read_answers(path: Path, items: Sequence[Item], benchmark: Benchmark) -> list[Prediction]:
    """A benchmark's lines of a prediction log. Raises ValueError, naming file, line and field."""
    known = {(item.video, str(query)) for item in items for query in item.query_ids}
    lines = read_lines(path, benchmark)
    for line in lines:
        video, query = line.prediction.video, line.prediction.query_id
        if (video, str(query)) not in known:
            raise ValueError(f"{line}: the ground truth has no question {query!r} about video {video!r}")
    if not lines:
        raise ValueError(f"{path}: holds no line whose task is {benchmark!r}")
    return [line.prediction for line in lines]


def answers_of(predictions: Sequence[Prediction]) -> Answers:
    return {(each.video, str(each.query_id)): each.answer for each in predictions}


def candidates(item: Item, answers: Answers) -> list[str] | None:
    """The answers to an item's questions; None if one is missing."""
    found = [answers.get((item.video, str(query))) for query in item.query_ids]
    return None if None in found else [text for text in found if text is not None]
