"""A judge's reply as a verdict. Replies are JSON, Python dictionaries, or either of them within prose."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pite.evaluate.qa.prompts import Axis

HIGHEST = 5.0
_JSON = json.JSONDecoder()
_BRACES = re.compile(r"\{[^{}]*\}")

_YES_OR_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """score  0..5; correct  whether the candidate matches, for the axis `match`, None for the others."""

    score: float
    correct: bool | None = None


def verdict(reply: str, axis: Axis) -> Verdict | None:
    """The first verdict of an axis in a reply; None for a malformed one."""
    return next((found for value in _objects(reply) if (found := _verdict(value, axis)) is not None), None)


def _objects(reply: str) -> Iterator[Any]:
    """The objects in a reply, nested ones too: JSON, or Python literals without a brace inside."""
    for brace in re.finditer(r"\{", reply):
        try:
            yield _JSON.raw_decode(reply, brace.start())[0]
        except (ValueError, RecursionError):
            if literal := _BRACES.match(reply, brace.start()):
                try:
                    yield ast.literal_eval(literal[0])
                except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                    continue


def _verdict(value: Any, axis: Axis) -> Verdict | None:
    score = _score(value.get("score")) if isinstance(value, dict) else None
    if score is None:
        return None
    if axis != "match":
        return Verdict(score)
    pred = value.get("pred")
    found = _YES_OR_NO.match(pred) if isinstance(pred, str) else None
    return Verdict(score, found[1].lower() == "yes") if found else None


def _score(value: Any) -> float | None:
    """A number of 0 to 5, or its digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and 0 <= number <= HIGHEST else None
