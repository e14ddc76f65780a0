"""What the commands of pite.evaluate do, from flags that are checked to a report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dataloaders.ranks import Ranks
from pite.evaluate import grounding
from pite.evaluate.flags import AnswerFlags, GroundingFlags, TrajectoriesFlags
from pite.evaluate.inputs import LeftOut, find_features, look_up, open_store
from pite.evaluate.predictions import Prediction
from pite.evaluate.questions import Question
from pite.evaluate.reports import Report

if TYPE_CHECKING:
    from pite.evaluate.answering import Model

log = logging.getLogger(__name__)

# What imports torch is imported after the flags and paths are checked: it takes seconds.


def score_grounding(flags: GroundingFlags, ranks: Ranks) -> Report | None:
    """Scores of a file of answers or of a model; None in all processes but the first."""
    truth = grounding.read_truth(flags.truth[0])
    if flags.model is None:
        assert flags.predictions is not None, "AnswerFlags requires it"
        predictions = grounding.read_answers(flags.predictions, truth)
        num_frames = grounding.frames_of(predictions, flags.num_frames, flags.predictions)
        report = grounding.report(predictions, truth, protocol=flags.protocol, num_frames=num_frames)
    else:
        model = open_model(flags, ranks)
        num_frames = model.num_frames
        if flags.num_frames not in (None, num_frames):
            raise ValueError(
                f"--num-frames {flags.num_frames}: {flags.model} has {num_frames} frames; leave --num-frames out"
            )
        answered = answer(flags, model, grounding.questions(truth, flags.question), grounding.MAX_NEW_TOKENS)
        if answered is None:
            return None
        predictions, left_out = answered
        report = grounding.report(predictions, truth, protocol=flags.protocol, num_frames=num_frames)
        report = report.adding(left_out.lines(), left_out.counts())
    draw_grounding(flags, predictions, truth, num_frames)
    return report


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


def answer(
    flags: AnswerFlags, model: Model, questions: Sequence[Question], max_new_tokens: int
) -> tuple[list[Prediction], LeftOut] | None:
    """A model's answers to questions, and the videos without; None in all processes but the first."""
    assert flags.store is not None, "AnswerFlags requires it"
    store = open_store(flags.store)
    model.check_features(store)
    inputs = find_features(questions, store, flags.store, flags.skip_missing)
    for line in inputs.left_out.lines():
        log.info(line)
    predictions = model.answer(inputs, flags.predictions, max_new_tokens, flags.overwrite)
    return None if predictions is None else (predictions, inputs.left_out)
