"""`pite.evaluate qa`: the judge that the flags name, and the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pite.evaluate.predictions import Prediction
from pite.evaluate.qa.benchmarks import Item, read_items
from pite.evaluate.qa.cache import Cache
from pite.evaluate.qa.endpoint import Endpoint
from pite.evaluate.qa.flags import QaFlags
from pite.evaluate.qa.judge import Judge
from pite.evaluate.qa.prompts import prompts
from pite.evaluate.qa.report import report
from pite.evaluate.reports import Report


def read_truth(flags: QaFlags) -> list[Item]:
    """The benchmark's questions and correct answers. Raises ValueError in one sentence."""
    return read_items(flags.benchmark, flags.truth, flags.video_names)


def check_judge(*runs: QaFlags) -> None:
    """Raise ValueError if the endpoint of some runs does not reply, before a model answers for hours.

    It gets one short prompt, unless all runs have a file with replies: then it has replied before, or is not needed again.
    """
    flags = next((each for each in runs if each.judge_url is not None and not _has_replies(each.cache)), None)
    if flags is None:
        return
    assert flags.judge_url is not None and flags.judge_model is not None, "JudgeFlags requires both"
    _endpoint(flags, flags.judge_url, flags.judge_model).check(
        prompts(Item(0, "", ("What is shown?",), "a dog"), ["a cat"])[0]
    )


def _has_replies(cache: Path) -> bool:
    """Whether a file holds a reply; a run that ended before the first one leaves an empty file."""
    return cache.exists() and cache.stat().st_size > 0


def evaluate(flags: QaFlags, truth: Sequence[Item], predictions: Sequence[Prediction]) -> Report:
    """Score answers by the judge that the flags name. Raises ValueError in one sentence."""
    if flags.judge_model is None:
        return report(predictions, truth, flags.benchmark, protocol=flags.protocol)
    with Cache(flags.cache) as cache:
        return report(
            predictions,
            truth,
            flags.benchmark,
            protocol=flags.protocol,
            by=_judge(flags, flags.judge_model),
            cache=cache,
            price=flags.price_per_million,
        )


def _judge(flags: QaFlags, model: str) -> Judge:
    if flags.judge_url is not None:
        return _endpoint(flags, flags.judge_url, model)
    from pite import devices
    from pite.evaluate.qa.local import LocalJudge

    return LocalJudge(Path(model), devices.select(flags.device))


def _endpoint(flags: QaFlags, url: str, model: str) -> Endpoint:
    limits = {"timeout": flags.timeout, "retries": flags.retries, "concurrency": flags.concurrency}
    return Endpoint(url, model, _key(flags.judge_key), **limits)


def _key(variable: str) -> str | None:
    """The endpoint's key in an environment variable; None where it is not set. An error does not show the key."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the key in the environment variable {variable} has characters that no header may hold")
    return key or None
