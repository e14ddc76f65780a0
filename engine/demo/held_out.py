"""Measures the demo's models on held-out videos, and draws an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dataloaders.decode.video import decode_video
from dataloaders.formats import Where, iter_json, read_pite
from dataloaders.samples.prompts import tokenize
from dataloaders.store.features import FeatureStore
from engine.demo.captions import describe, score_captions, score_dense
from engine.demo.example import example_event
from pite.draw import Track, save_strip, save_video
from pite.evaluate.answering import check_features
from pite.evaluate.grounding import Events, ious, read_answers, read_truth
from pite.evaluate.inputs import key_of
from pite.evaluate.metrics import (
    MotionScores,
    TrajectoryScores,
    best_fixed_interval,
    grounding_scores,
    motion_scores,
    question_blind_bound,
    trajectory_scores,
)
from pite.evaluate.predictions import Prediction
from pite.evaluate.protocols import Protocol
from pite.evaluate.trajectories import predict_trajectories, read_samples
from pite.generate import Generator

Features = Callable[[str], np.ndarray]

PROTOCOL: Protocol = "published"
"""The demo's answers have two-digit indices, and its numbers are compared with those of earlier versions."""


@dataclass(frozen=True)
class Grounding:
    """Mean IoUs (0..1) over the questions of some videos, and the bounds to compare them with.

    miou            of the model
    best_fixed      of the best single interval for all questions, chosen with the true answers
    question_blind  question-blind upper bound: of the best interval per video, chosen with the true answers
    """

    miou: float
    best_fixed: float
    question_blind: float
    recall: dict[float, float]
    questions: int
    videos: int


def measure_grounding(
    predictions: Sequence[Prediction], truth: dict[str, Events], num_frames: int
) -> tuple[Grounding, dict[int, Grounding]]:
    """Scores over all predictions, and by the number of objects (events) in the video."""
    counts = sorted({len(truth[prediction.video].intervals) for prediction in predictions})
    by_objects = {
        count: _grounding([p for p in predictions if len(truth[p.video].intervals) == count], truth, num_frames)
        for count in counts
    }
    return _grounding(predictions, truth, num_frames), by_objects


def _grounding(predictions: Sequence[Prediction], truth: dict[str, Events], num_frames: int) -> Grounding:
    scores = grounding_scores(ious(predictions, truth, num_frames, PROTOCOL))
    videos = sorted({prediction.video for prediction in predictions})
    intervals = [truth[video].intervals for video in videos]
    every = [interval for those in intervals for interval in those]
    return Grounding(
        miou=scores.miou / 100,
        best_fixed=best_fixed_interval(every, num_frames, PROTOCOL)[1],
        question_blind=question_blind_bound(intervals, num_frames, PROTOCOL),
        recall={threshold: share / 100 for threshold, share in scores.recall.items()},
        questions=scores.count,
        videos=len(videos),
    )


def measure_trajectories(
    generator: Generator, annotations: Path, features: Features
) -> tuple[TrajectoryScores, MotionScores]:
    """Scores of the trajectory head, over the answers in an annotation file."""
    samples = read_samples(annotations, generator.model.config, generator.tokenizer).samples
    predicted, true = predict_trajectories(generator.model, samples, features)
    return trajectory_scores(predicted, true), motion_scores(predicted, true)


def draw_example(
    generator: Generator, annotations: Path, features: Features, video: str, strip: Path, film: Path
) -> None:
    """Predicted and true trajectories of every phrase of one held-out answer: `strip` as PNG, `film` as MP4."""
    config = generator.model.config
    shape = {"num_frames": config.num_frames, "num_points": config.num_points}
    where, record = next((Where(annotations, at), r) for at, _, r in iter_json(annotations) if r["id"] == video)
    sample = read_pite(record, where, annotations.parent, **shape)
    predicted, true = predict_trajectories(generator.model, [tokenize(sample, generator.tokenizer, **shape)], features)
    (turn,) = sample.turns
    tracks = []
    for mention in turn.mentions:
        tokens = (true == mention.trajectory).all((1, 2, 3))
        tracks.append(Track(turn.answer[mention.start : mention.end], predicted[tokens].mean(0), mention.trajectory))
    frames = decode_video(annotations.parent / "videos" / f"{video}.mp4", config.num_frames)
    save_strip(strip, frames, tracks, title=turn.answer)
    save_video(film, frames, tracks)


def summarize(output: Path) -> dict[str, object]:
    """Measure the models of a finished demo in `output`, draw one example, and return the summary's numbers."""
    evaluation = output / "data" / "evaluation"
    store = FeatureStore(output / "store" / "videos")
    features = store.read
    annotations = evaluation / "activitynet_captions.json"
    truth = read_truth(annotations)
    models = [output / "run" / f"stage{n}" / "final" for n in (2, 3)]
    for model in models:
        check_features(store, model)
    stage2, stage3 = map(Generator.from_pretrained, models)
    predictions = read_answers(output / "grounding.jsonl", truth)
    every, by_objects = measure_grounding(predictions, truth, stage3.model.config.num_frames)
    tracks = evaluation / "pite_143k.jsonl"
    trajectories, motion = measure_trajectories(stage2, tracks, features)
    after_stage3, _ = measure_trajectories(stage3, tracks, features)
    descriptions = describe(stage2, list(truth), lambda video: features(key_of(video)))
    captions = score_captions(descriptions, truth, stage2.model.config.num_frames)
    dense = score_dense(descriptions, annotations, stage2.model.config.num_frames)
    video, _ = example_event(annotations)
    draw_example(stage2, tracks, features, video, output / "overlay.png", output / "overlay.mp4")
    return {
        "trajectory_l1": trajectories.l1,
        "trajectory_l1_best_constant": trajectories.best_constant,
        "trajectory_l1_static_oracle": trajectories.static_oracle,
        "trajectory_l1_after_stage3": after_stage3.l1,
        "motion_slope": motion.slope,
        "motion_directions": motion.directions,
        **{f"caption_{name}": value for name, value in asdict(captions).items()},
        **{f"captioning_{name}": value for name, value in dense.items()},
        "grounding_miou": every.miou,
        "grounding_miou_best_fixed": every.best_fixed,
        "grounding_miou_query_blind": every.question_blind,
        "grounding_recall": {f"R1@{threshold}": share for threshold, share in every.recall.items()},
        "grounding_miou_by_objects": {str(n): scores.miou for n, scores in by_objects.items()},
        "grounding_miou_query_blind_by_objects": {str(n): scores.question_blind for n, scores in by_objects.items()},
        "questions_by_objects": {str(n): scores.questions for n, scores in by_objects.items()},
        "held_out_videos": every.videos,
        "held_out_questions": every.questions,
    }
