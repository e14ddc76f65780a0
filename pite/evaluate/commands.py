"""What the commands of pite.evaluate do, from flags that are checked to a report."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dataloaders.ranks import Ranks
from pite.evaluate import grounding
from pite.evaluate.benchmarks import benchmark_of
from pite.evaluate.flags import AnswerFlags, TrajectoriesFlags
from pite.evaluate.inputs import Inputs, find_features, look_up, open_store
from pite.evaluate.qa.command import check_judge
from pite.evaluate.qa.flags import QaFlags
from pite.evaluate.reports import Report

if TYPE_CHECKING:
    from pite.evaluate.answering import Model

log = logging.getLogger(__name__)

# What imports torch is imported after the flags and paths are checked: it takes seconds.


def score_answers(flags: AnswerFlags, ranks: Ranks, model: Model | None = None) -> Report | None:
    """Scores of a file of answers or of a model; None in all processes but the first.

    model  that of --model, if it is open already, and its transcripts are checked
    """
    if flags.model is None:
        return None if ranks.rank else _score_file(flags)
    alone = model is None
    if alone and isinstance(flags, QaFlags) and ranks.rank == 0:
        check_judge(flags)
    model = model or open_model(flags, ranks)
    if flags.given_frames not in (None, model.num_frames):
        raise ValueError(
            f"--num-frames {flags.given_frames}: {flags.model} has {model.num_frames} frames; leave --num-frames out"
        )
    benchmark, inputs = benchmark_of(flags), find_inputs(flags, model)
    if alone:
        model.check_transcripts([inputs])
    for line in [*inputs.left_out.lines(), *model.count_transcripts(inputs)]:
        log.info(line)
    predictions = model.answer(inputs, flags.predictions, benchmark.max_new_tokens, flags.overwrite)
    if predictions is None:
        return None
    report = benchmark.report(flags, predictions, benchmark.read_truth(flags), model.num_frames)
    return report.adding(inputs.left_out.lines(), inputs.left_out.counts())


def find_inputs(flags: AnswerFlags, model: Model) -> Inputs:
    """The questions whose videos have features. Raises ValueError for videos without, and for other features."""
    assert flags.store is not None, "AnswerFlags requires it"
    benchmark, store = benchmark_of(flags), open_store(flags.store)
    model.check_features(store)
    questions = benchmark.questions(flags, benchmark.read_truth(flags))
    return find_features(questions, store, flags.store, flags.skip_missing)


def open_model(flags: AnswerFlags, ranks: Ranks) -> Model:
    """The model of --model, whose weights are loaded when they are needed."""
    from pite.evaluate.answering import Model

    assert flags.model is not None
    return Model(flags.model, flags.device, flags.batch_size, ranks, flags.family, flags.transcripts)


def _score_file(flags: AnswerFlags) -> Report:
    """Scores of the answers in the file of --predictions."""
    assert flags.predictions is not None, "AnswerFlags requires it"
    benchmark = benchmark_of(flags)
    truth = benchmark.read_truth(flags)
    predictions = benchmark.read_answers(flags, truth)
    num_frames = grounding.frames_of(predictions, flags.given_frames, flags.predictions)
    return benchmark.report(flags, predictions, truth, num_frames)


def score_trajectories(flags: TrajectoriesFlags, ranks: Ranks, model: Model | None = None) -> Report | None:
    """Scores of the model's trajectories in the held-out answers; of several processes only the first computes them.

    model  that of --model, if it is open already
    """
    if ranks.rank:
        return None
    from pite.evaluate import trajectories
    from pite.evaluate.answering import Model
    from pite.tokenizers import load_tokenizer

    model = model or Model(flags.model, flags.device, 1, ranks)
    if "trajectory_projector" not in model.config.choices.modules:
        raise ValueError(
            f"{flags.model} is a model of the family {model.config.family}, which predicts no trajectories"
        )
    store = open_store(flags.store)
    model.check_features(store)
    tokenizer = load_tokenizer(model.directory)
    read = trajectories.read_samples(flags.samples, model.config, tokenizer, flags.failure_budget)
    videos = [sample.media.partition("/")[2] for sample in read.samples]
    left_out = look_up(videos, store, flags.store, flags.skip_missing)
    if warning := trajectories.trajectory_head_warning(flags.model):
        log.warning(warning)
    samples = [sample for sample, video in zip(read.samples, videos) if video not in left_out.videos]
    found = trajectories.predict_trajectories(model.generator.model, samples, store.read)
    lines = left_out.lines()
    if read.malformed:
        lines.append(f"{len(read.malformed):,} of {read.records:,} records are malformed, such as {read.malformed[0]}")
    counts = {**left_out.counts(), "malformed records": len(read.malformed)}
    return trajectories.report(*found, len(samples)).adding(lines, counts)
