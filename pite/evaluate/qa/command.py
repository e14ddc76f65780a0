"""`pite.evaluate qa`: the judge that the flags name, and the report."""

from __future__ import annotations

import os
from pathlib import Path

from pite.evaluate.qa.benchmarks import read_items
from pite.evaluate.qa.cache import Cache
from pite.evaluate.qa.endpoint import Endpoint
from pite.evaluate.qa.flags import QaFlags
from pite.evaluate.qa.judge import Judge
from pite.evaluate.qa.report import report
from pite.evaluate.qa.task import read_answers
from pite.evaluate.reports import Report


def evaluate(flags: QaFlags) -> Report:
    """Score a prediction file. Raises ValueError in one sentence."""
    truth = read_items(flags.benchmark, flags.ground_truth, flags.video_names)
    predictions = read_answers(flags.predictions, truth, flags.benchmark)
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
        return Endpoint(
            flags.judge_url,
            model,
            _key(flags.judge_key),
            timeout=flags.timeout,
            retries=flags.retries,
            concurrency=flags.concurrency,
        )
    from pite import devices
    from pite.evaluate.qa.local import LocalJudge

    return LocalJudge(Path(model), devices.select(flags.device))


def _key(variable: str) -> str | None:
    """The endpoint's key in an environment variable; None where it is not set. An error does not show the key."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the key in the environment variable {variable} has characters that no header may hold")
    return key or None
