"""Dense captioning: which events does a video show, and when? Scored against ActivityNet Captions."""

from pite.evaluate.captioning.report import report
from pite.evaluate.captioning.task import (
    MAX_NEW_TOKENS,
    QUESTION,
    TASK,
    Annotated,
    Truth,
    questions,
    read_answers,
    read_truth,
)

__all__ = [
    "MAX_NEW_TOKENS",
    "QUESTION",
    "TASK",
    "Annotated",
    "Truth",
    "questions",
    "read_answers",
    "read_truth",
    "report",
]
