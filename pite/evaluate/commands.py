"""What the commands of pite.evaluate do, from flags that are checked to a report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataloaders.ranks import Ranks
from pite.evaluate import captioning, grounding
from pite.evaluate.captioning.flags import CaptioningFlags
from pite.evaluate.flags import AnswerFlags, GroundingFlags, TrajectoriesFlags
from pite.evaluate.inputs import LeftOut, find_features, look_up, open_store
from pite.evaluate.predictions import Prediction
from pite.evaluate.qa import command as qa
from pite.evaluate.qa import task as qa_task
from pite.evaluate.qa.flags import QaFlags
from pite.evaluate.questions import Question
from pite.evaluate.reports import Report

if TYPE_CHECKING:
    from pite.evaluate.answering import Model

log = logging.getLogger(__name__)

# What imports torch is imported after the flags and paths are checked: it takes seconds.


@dataclass(frozen=True)
class Answers:
    """Answers to score.

    num_frames  frames per video that the indices in them count
    left_out    videos without an answer, because they have no features; None for a file of answers
    """

    predictions: list[Prediction]
    num_frames: int
    left_out: LeftOut | None = None

    def add_left_out(self, report: Report) -> Report:
        """The report with the videos that are left out."""
        return report if self.left_out is None else report.adding(self.left_out.lines(), self.left_out.counts())


def score_grounding(flags: GroundingFlags, ranks: Ranks, model: Model | None = None) -> Report | None:
    """Scores of a file of answers or of a model; None in all processes but the first.

    model  that of --model, if it is open already
    """
    truth = grounding.read_truth(flags.truth[0])
    if flags.model is None:
        answers = _read(flags, grounding.read_answers, truth, flags.num_frames)
    else:
        model = model or open_model(flags, ranks)
        _check_frames(flags.num_frames, model)
        answers = answer(flags, model, grounding.questions(truth, flags.question), grounding.MAX_NEW_TOKENS)
    if answers is None:
        return None
    report = grounding.report(answers.predictions, truth, protocol=flags.protocol, num_frames=answers.num_frames)
    draw_grounding(flags, answers.predictions, truth, answers.num_frames)
    return answers.add_left_out(report)


def score_captioning(flags: CaptioningFlags, ranks: Ranks, model: Model | None = None) -> Report | None:
    """As `score_grounding`."""
    truth = captioning.read_truth(*flags.truth)
    if flags.model is None:
        answers = _read(flags, captioning.read_answers, truth, flags.num_frames)
    else:
        model = model or open_model(flags, ranks)
        _check_frames(flags.num_frames, model)
        answers = answer(flags, model, captioning.questions(truth, flags.question), captioning.MAX_NEW_TOKENS)
    if answers is None:
        return None
    report = captioning.report(answers.predictions, truth, protocol=flags.protocol, num_frames=answers.num_frames)
    return answers.add_left_out(report)


def score_qa(flags: QaFlags, ranks: Ranks, model: Model | None = None) -> Report | None:
    """As `score_grounding`; the first process calls the judge."""
    truth = qa.read_truth(flags)
    if flags.model is None:
        assert flags.predictions is not None, "AnswerFlags requires it"
        return qa.evaluate(flags, truth, qa_task.read_answers(flags.predictions, truth, flags.benchmark))
    model = model or open_model(flags, ranks)
    answers = answer(flags, model, qa_task.questions(truth, flags.benchmark), qa_task.MAX_NEW_TOKENS)
    return None if answers is None else answers.add_left_out(qa.evaluate(flags, truth, answers.predictions))


def _read(
    flags: AnswerFlags, read: Callable[[Path, Any], list[Prediction]], truth: object, num_frames: int | None
) -> Answers:
    """The answers in the file of --predictions."""
    assert flags.predictions is not None, "AnswerFlags requires it"
    predictions = read(flags.predictions, truth)
    return Answers(predictions, grounding.frames_of(predictions, num_frames, flags.predictions))


def _check_frames(given: int | None, model: Model) -> None:
    if given not in (None, model.num_frames):
        raise ValueError(f"--num-frames {given}: {model.name} has {model.num_frames} frames; leave --num-frames out")


def draw_grounding(
    flags: GroundingFlags, predictions: Sequence[Prediction], truth: grounding.Truth, num_frames: int
) -> None:
    """Draw the plots of --histogram and --timeline."""
    if flags.histogram is None and flags.timeline is None:
        return
    from pite.evaluate.plots import draw_histogram, draw_timeline

    if flags.histogram is not None:
        draw_histogram(flags.histogram, grounding.ious(predictions, truth, num_frames, flags.protocol))
    if flags.timeline is not None:
        draw_timeline(flags.timeline, predictions, truth, num_frames, flags.protocol)


def score_trajectories(flags: TrajectoriesFlags, ranks: Ranks) -> Report | None:
    """Scores of the model's trajectories in the held-out answers; of several processes only the first computes them."""
    if ranks.rank:
        return None
    from pite import checkpoint, devices
    from pite.config import PiTeConfig
    from pite.evaluate import trajectories
    from pite.evaluate.answering import check_features
    from pite.tokenizers import load_tokenizer

    device, directory = devices.select(flags.device), checkpoint.resolve(flags.model)
    checkpoint.check_trained(directory)
    config, store = PiTeConfig.load(directory), open_store(flags.store)
    check_features(store, directory)
    read = trajectories.read_samples(flags.samples, config, load_tokenizer(directory), flags.failure_budget)
    videos = [sample.media.partition("/")[2] for sample in read.samples]
    left_out = look_up(videos, store, flags.store, flags.skip_missing)
    if warning := trajectories.trajectory_head_warning(flags.model):
        log.warning(warning)
    model = checkpoint.from_pretrained(directory, devices.dtype(devices.resolve(device)), device)
    samples = [sample for sample, video in zip(read.samples, videos) if video not in left_out.videos]
    report = trajectories.report(*trajectories.predict_trajectories(model, samples, store.read), len(samples))
    lines = left_out.lines()
    if read.malformed:
        lines.append(f"{len(read.malformed):,} of {read.records:,} records are malformed, such as {read.malformed[0]}")
    return report.adding(lines, {**left_out.counts(), "malformed records": len(read.malformed)})


def open_model(flags: AnswerFlags, ranks: Ranks) -> Model:
    """The model of --model, whose weights are loaded when they are needed."""
    from pite.evaluate.answering import Model

    assert flags.model is not None
    return Model(flags.model, flags.device, flags.batch_size, ranks)


def answer(flags: AnswerFlags, model: Model, questions: Sequence[Question], max_new_tokens: int) -> Answers | None:
    """A model's answers to the questions whose videos have features; None in all processes but the first."""
    assert flags.store is not None, "AnswerFlags requires it"
    store = open_store(flags.store)
    model.check_features(store)
    inputs = find_features(questions, store, flags.store, flags.skip_missing)
    for line in inputs.left_out.lines():
        log.info(line)
    predictions = model.answer(inputs, flags.predictions, max_new_tokens, flags.overwrite)
    return None if predictions is None else Answers(predictions, model.num_frames, inputs.left_out)
