"""Scores of video question answering as text and numbers.

Accuracy is yes / (yes + no) of the judge, and a score the mean of its 0..5. `strict` counts a question without an answer
as no with score 0; `published` leaves it out, and cuts scores to whole numbers, as Video-ChatGPT's scripts do. Items
whose judge failed are left out and counted.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from statistics import fmean

from pite.evaluate.predictions import Prediction
from pite.evaluate.protocols import Protocol
from pite.evaluate.qa.benchmarks import Benchmark, Item
from pite.evaluate.qa.cache import Cache
from pite.evaluate.qa.judge import Judge, Judgement, Price, judge
from pite.evaluate.qa.prompts import AXES, Axis, prompts
from pite.evaluate.qa.replies import Verdict
from pite.evaluate.qa.task import answers_of, candidates
from pite.evaluate.reports import Report

Numbers = dict[str, str | float]

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MISSING = Verdict(0.0, False)


def report(
    predictions: Sequence[Prediction],
    truth: Sequence[Item],
    benchmark: Benchmark,
    *,
    protocol: Protocol = "strict",
    by: Judge | None = None,
    cache: Cache | None = None,
    price: Price | None = None,
) -> Report:
    """Scores of the answers to a benchmark's questions; without a judge only the exact matches of short answers.

    Raises ValueError if no item has an answer, and if the judge gives no verdict at all.
    """
    answers = answers_of(predictions)
    answered = {item: found for item in truth if (found := candidates(item, answers)) is not None}
    if not answered:
        raise ValueError("no question has an answer")
    items = [item for item in truth if protocol == "strict" or item in answered]
    numbers = exact_match(items, answered)
    if by is not None:
        numbers |= _judged(items, answered, protocol, by, cache or Cache(), price)
    unanswered = len(truth) - len(answered)
    numbers |= {"items": len(truth), "items without an answer": unanswered, "protocol": protocol}
    return Report(benchmark, _text(numbers), numbers)


def exact_match(items: Sequence[Item], answered: Mapping[Item, Sequence[str]]) -> Numbers:
    """Percentage of short items whose answer equals the correct one, up to case, punctuation, articles and spaces."""
    hits = [item in answered and normalised(answered[item][0]) == normalised(item.answer) for item in _short(items)]
    return {"exact match": 100 * fmean(hits)} if hits else {}


def _short(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.kind == "short"]


def normalised(answer: str) -> str:
    words = answer.lower().translate(_PUNCTUATION).split()
    # An answer that is an article, such as the letter A, stays.
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _judged(
    items: Sequence[Item],
    answered: Mapping[Item, Sequence[str]],
    protocol: Protocol,
    by: Judge,
    cache: Cache,
    price: Price | None,
) -> Numbers:
    wanted = [prompt for item in items if item in answered for prompt in prompts(item, answered[item])]
    judgement = judge(wanted, by, cache, price)
    if judgement.failed == len(wanted):
        raise ValueError(f"the judge {by.name} gave no verdict: {judgement.malformed:,} replies are malformed")
    of: dict[Axis, list[Verdict]] = {}
    for prompt, found in zip(wanted, judgement.verdicts, strict=True):
        of.setdefault(prompt.axis, []).extend([] if found is None else [found])
    for item in items:
        for axis in AXES[item.kind] if item not in answered else ():
            of.setdefault(axis, []).append(_MISSING)
    return _scores(of, protocol) | _counts(by, judgement)


def _scores(of: Mapping[Axis, Sequence[Verdict]], protocol: Protocol) -> Numbers:
    numbers: Numbers = {}
    for axis, verdicts in of.items():
        if not verdicts:
            continue
        if axis == "match":
            numbers["accuracy"] = 100 * fmean(verdict.correct is True for verdict in verdicts)
        scores = [int(each.score) if protocol == "published" else each.score for each in verdicts]
        numbers["score" if axis == "match" else axis] = fmean(scores)
    return numbers


def _counts(by: Judge, judgement: Judgement) -> Numbers:
    return {
        "judge": by.name,
        "prompts": len(judgement.verdicts),
        "calls": judgement.calls,
        "malformed replies": judgement.malformed,
        "prompts without a verdict": judgement.failed,
    }


_SCORES = ("exact match", "accuracy", "score", "correctness", "detail", "context", "temporal", "consistency")


def _text(numbers: Mapping[str, str | float]) -> str:
    lines = [f"{name:<12} {numbers[name]:6.2f}" for name in _SCORES if name in numbers]
    if "judge" in numbers:
        lines.append(f"judge {numbers['judge']}: {numbers['prompts']:,} verdicts wanted, {numbers['calls']:,} calls")
    else:
        lines.append("exact match compares texts and uses no judge: published accuracies are a judge's")
    lines += [
        f"{numbers[name]:,} {name}"
        for name in ("malformed replies", "prompts without a verdict", "items without an answer")
        if numbers.get(name)
    ]
    return "\n".join([*lines, f"over {numbers['items']:,} items, protocol {numbers['protocol']}"])
