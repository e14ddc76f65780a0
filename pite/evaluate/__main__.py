"""Scores a prediction file or a model.

python -m pite.evaluate grounding --predictions P.jsonl --ground-truth G.json
python -m pite.evaluate grounding --model DIR --data DIR --store DIR
python -m pite.evaluate trajectories --model DIR --data DIR --store DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloaders.files import write_atomically
from dataloaders.store.features import FeatureStore
from pite import devices
from pite.evaluate.grounding import (
    QUESTION,
    Events,
    answer_questions,
    ious,
    read_ground_truth,
    read_predictions,
    write_predictions,
)
from pite.evaluate.metrics import best_fixed_interval, grounding_scores, question_blind_bound, trajectory_scores
from pite.evaluate.trajectories import predict_trajectories, read_samples, trajectory_head_warning
from pite.generate import Generator

Report = tuple[str, dict[str, str | float]]
"""The printed text, and its numbers by name."""

SPLIT = "evaluation"
"""The held-out split: its folder in a data folder, and the first part of its features' keys."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 after a one-sentence error."""
    arguments = _parser().parse_args(argv)
    try:
        devices.select(arguments.device)
        report, scores = arguments.run(arguments)
        print(report)
        if arguments.scores is not None:
            write_atomically(arguments.scores, json.dumps(scores, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"pite.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def _grounding(arguments: argparse.Namespace) -> Report:
    for flag, value in (("--batch-size", arguments.batch_size), ("--num-frames", arguments.num_frames)):
        if value < 1:
            raise ValueError(f"{flag} must be at least 1, not {value}")
    if arguments.model is None:
        if arguments.predictions is None or arguments.ground_truth is None:
            raise ValueError("grounding needs --predictions and --ground-truth, or --model, --data and --store")
        truth = read_ground_truth(arguments.ground_truth)
        predictions = read_predictions(arguments.predictions, truth)
        num_frames = arguments.num_frames
    else:
        data, read_features = _data_and_store(arguments)
        truth = read_ground_truth(arguments.ground_truth or data / "activitynet_captions.json")
        generator = _generator(arguments)
        num_frames = generator.model.config.num_frames
        answers = answer_questions(
            generator,
            truth,
            lambda video: read_features(f"{SPLIT}/{video}"),
            question=arguments.question,
            batch_size=arguments.batch_size,
        )
        predictions = list(tqdm(answers, "answers", _num_events(truth), unit="event", file=sys.stderr))
        if arguments.predictions is not None:
            write_predictions(arguments.predictions, predictions)
    scores = grounding_scores(ious(predictions, truth, num_frames))
    answered = {prediction.video for prediction in predictions}
    intervals = [truth[video].intervals for video in truth if video in answered]
    fixed = best_fixed_interval([interval for those in intervals for interval in those], num_frames)[1] * 100
    blind = question_blind_bound(intervals, num_frames) * 100
    lines = [f"{name:<8} {value:6.2f}" for name, value in scores.as_dict().items()]
    lines.append(f"mIoU of the best fixed interval {fixed:.2f}")
    lines.append(f"mIoU of the question-blind upper bound (best interval per video) {blind:.2f}")
    lines.append(f"over {scores.count} answers; the ground truth has {_num_events(truth)} events")
    bounds = {"mIoU of the best fixed interval": fixed, "mIoU of the best interval per video": blind}
    return "\n".join(lines), {"task": "grounding", **scores.as_dict(), **bounds, "answers": scores.count}


def _trajectories(arguments: argparse.Namespace) -> Report:
    data, read_features = _data_and_store(arguments)
    generator = _generator(arguments)
    if warning := trajectory_head_warning(arguments.model):
        print(f"pite.evaluate: {warning}", file=sys.stderr)
    samples = list(read_samples(data / "pite_143k.jsonl", generator.model, generator.tokenizer))
    longest = max((len(sample.token_ids) for sample in samples), default=0)
    if warning := generator.model.config.beyond_context(longest):
        print(f"pite.evaluate: {warning}", file=sys.stderr)
    predicted, true = predict_trajectories(generator.model, samples, read_features)
    scores = trajectory_scores(predicted, true)
    report = (
        f"L1            {scores.l1:.4f}\n"
        f"best constant {scores.best_constant:.4f}\n"
        f"static oracle {scores.static_oracle:.4f}\n"
        f"over {len(true)} tokens of {len(samples)} answers"
    )
    numbers = {"L1": scores.l1, "constant": scores.best_constant, "unmoved": scores.static_oracle, "tokens": len(true)}
    return report, {"task": "trajectories", **numbers}


def _num_events(truth: dict[str, Events]) -> int:
    return sum(len(events.sentences) for events in truth.values())


def _data_and_store(arguments: argparse.Namespace) -> tuple[Path, Callable[[str], np.ndarray]]:
    if arguments.data is None or arguments.store is None:
        raise ValueError("--model needs --data and --store: the held-out annotations and the features of their videos")
    return arguments.data / SPLIT, FeatureStore(arguments.store / "videos").read


def _generator(arguments: argparse.Namespace) -> Generator:
    return Generator.from_pretrained(arguments.model, device=arguments.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pite.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    grounding = tasks.add_parser("grounding", help="when in the video is this sentence?", allow_abbrev=False)
    grounding.set_defaults(run=_grounding)
    grounding.add_argument(
        "--predictions", type=Path, metavar="P.jsonl", help="prediction file: read, or with --model written"
    )
    grounding.add_argument(
        "--ground-truth",
        type=Path,
        metavar="G.json",
        help="ActivityNet Captions (default with --model: DATA/evaluation/activitynet_captions.json)",
    )
    grounding.add_argument(
        "--num-frames",
        type=int,
        default=100,
        help="frames per video, for the indices in --predictions (default: %(default)s); --model has its own number",
    )
    grounding.add_argument("--question", default=QUESTION, help="{} stands for the sentence (default: %(default)s)")
    grounding.add_argument("--batch-size", type=int, default=32, help="questions per batch (default: %(default)s)")
    trajectories = tasks.add_parser("trajectories", help="where are the mentioned objects?", allow_abbrev=False)
    trajectories.set_defaults(run=_trajectories)
    for task in (grounding, trajectories):
        task.add_argument(
            "--model",
            type=Path,
            metavar="DIR",
            required=task is trajectories,
            help="a stage's output, an export, or OWNER/NAME on the hub",
        )
        task.add_argument("--data", type=Path, metavar="DIR", help="data folder with evaluation/")
        task.add_argument("--store", type=Path, metavar="DIR", help="features that engine.encode made from it")
        task.add_argument(
            "--scores", type=Path, metavar="S.json", help="also write the scores to this file, for pite.export"
        )
        task.add_argument("--device", default=devices.default(), help="cpu, cuda or cuda:1 (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
