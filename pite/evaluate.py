"""Scores a model or its predictions: `python -m pite.evaluate grounding --predictions P.jsonl --ground-truth G.json`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pite.grounding import ious, read_ground_truth, read_predictions
from pite.metrics import GroundingScores, grounding_scores


def _report(scores: GroundingScores, num_events: int) -> str:
    lines = [f"{name:<8} {value:6.2f}" for name, value in scores.as_dict().items()]
    lines.append(f"over {scores.count} answers; the ground truth has {num_events} events")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pite.evaluate", description=__doc__, allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True)
    grounding = tasks.add_parser("grounding", help="when in the video is this sentence?", allow_abbrev=False)
    grounding.add_argument("--predictions", type=Path, metavar="P.jsonl", required=True)
    grounding.add_argument("--ground-truth", type=Path, metavar="G.json", required=True)
    grounding.add_argument("--num-frames", type=int, default=100, help="frames that the answers' indices count")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 after a one-sentence error."""
    arguments = _parser().parse_args(argv)
    try:
        truth = read_ground_truth(arguments.ground_truth)
        predictions = read_predictions(arguments.predictions, truth)
        scores = grounding_scores(ious(predictions, truth, arguments.num_frames))
    except ValueError as error:
        print(f"pite.evaluate: {error}", file=sys.stderr)
        return 2
    print(_report(scores, sum(len(events.sentences) for events in truth.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
