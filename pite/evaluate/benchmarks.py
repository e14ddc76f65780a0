"""The benchmarks whose questions a model answers: how each is read, put to a model and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pite.evaluate import captioning, grounding
from pite.evaluate.captioning.flags import CaptioningFlags
from pite.evaluate.flags import AnswerFlags, GroundingFlags
from pite.evaluate.predictions import Prediction
from pite.evaluate.qa import command as qa
from pite.evaluate.qa import task as qa_task
from pite.evaluate.qa.flags import QaFlags
from pite.evaluate.questions import Question
from pite.evaluate.reports import Report


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; `flags` are those of its command.

    read_truth    flags -> the ground truth
    questions     flags, truth -> the questions to a model
    read_answers  flags, truth -> the predictions in the file of --predictions
    report        flags, predictions, truth, frames per video -> the scores
    """

    read_truth: Callable[[Any], Any]
    questions: Callable[[Any, Any], list[Question]]
    read_answers: Callable[[Any, Any], list[Prediction]]
    report: Callable[[Any, Sequence[Prediction], Any, int], Report]
    max_new_tokens: int


def _grounding_report(
    flags: GroundingFlags, predictions: Sequence[Prediction], truth: grounding.Truth, num_frames: int
) -> Report:
    report = grounding.report(predictions, truth, protocol=flags.protocol, num_frames=num_frames)
    if flags.histogram is not None or flags.timeline is not None:
        # Imported here, because matplotlib takes a second.
        from pite.evaluate.plots import draw_histogram, draw_timeline

        if flags.histogram is not None:
            draw_histogram(flags.histogram, grounding.ious(predictions, truth, num_frames, flags.protocol))
        if flags.timeline is not None:
            draw_timeline(flags.timeline, predictions, truth, num_frames, flags.protocol)
    return report


def _captioning_report(
    flags: CaptioningFlags, predictions: Sequence[Prediction], truth: captioning.Truth, num_frames: int
) -> Report:
    return captioning.report(predictions, truth, protocol=flags.protocol, num_frames=num_frames)


_BENCHMARKS: dict[type[AnswerFlags], Benchmark] = {
    GroundingFlags: Benchmark(
        read_truth=lambda flags: grounding.read_truth(flags.truth[0]),
        questions=lambda flags, truth: grounding.questions(truth, flags.question),
        read_answers=lambda flags, truth: grounding.read_answers(flags.predictions, truth),
        report=_grounding_report,
        max_new_tokens=grounding.MAX_NEW_TOKENS,
    ),
    CaptioningFlags: Benchmark(
        read_truth=lambda flags: captioning.read_truth(*flags.truth),
        questions=lambda flags, truth: captioning.questions(truth, flags.question),
        read_answers=lambda flags, truth: captioning.read_answers(flags.predictions, truth),
        report=_captioning_report,
        max_new_tokens=captioning.MAX_NEW_TOKENS,
    ),
    QaFlags: Benchmark(
        read_truth=qa.read_truth,
        questions=lambda flags, truth: qa_task.questions(truth, flags.benchmark),
        read_answers=lambda flags, truth: qa_task.read_answers(flags.predictions, truth, flags.benchmark),
        report=lambda flags, predictions, truth, _: qa.evaluate(flags, truth, predictions),
        max_new_tokens=qa_task.MAX_NEW_TOKENS,
    ),
}


def benchmark_of(flags: AnswerFlags) -> Benchmark:
    return _BENCHMARKS[type(flags)]
