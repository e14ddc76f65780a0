"""Temporal grounding: when in the video is this sentence?"""

from pite.evaluate.grounding.answers import (
    MAX_NEW_TOKENS,
    NUM_FRAMES,
    QUESTION,
    TASK,
    frames_of,
    ious,
    question_for,
    questions,
    read_answers,
)
from pite.evaluate.grounding.report import report
from pite.evaluate.grounding.truth import Events, Truth, num_events, read_truth

__all__ = [
    "MAX_NEW_TOKENS",
    "NUM_FRAMES",
    "QUESTION",
    "TASK",
    "Events",
    "Truth",
    "frames_of",
    "ious",
    "num_events",
    "question_for",
    "questions",
    "read_answers",
    "read_truth",
    "report",
]
