"""Video question answering: five benchmarks, scored by exact matching or by a language model as a judge."""

from pite.evaluate.qa.benchmarks import BENCHMARKS, Benchmark, Item, read_items
from pite.evaluate.qa.report import report
from pite.evaluate.qa.task import MAX_NEW_TOKENS, QUESTION, questions, read_answers

__all__ = [
    "BENCHMARKS",
    "MAX_NEW_TOKENS",
    "QUESTION",
    "Benchmark",
    "Item",
    "questions",
    "read_answers",
    "read_items",
    "report",
]
