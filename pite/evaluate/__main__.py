"""Scores a prediction file or a model.

python -m pite.evaluate grounding --predictions P.jsonl --ground-truth G.json
python -m pite.evaluate grounding --model DIR --data DIR --store DIR
python -m pite.evaluate captioning --predictions P.jsonl --ground-truth val_1.json val_2.json
python -m pite.evaluate qa --benchmark msvd_qa --predictions P.jsonl --ground-truth test_qa.json --judge-url URL ...
python -m pite.evaluate trajectories --model DIR --data DIR --store DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dataloaders import logs
from dataloaders.cli import parse_command, run
from dataloaders.files import write_atomically
from pite.evaluate import captioning, grounding
from pite.evaluate.captioning.flags import CaptioningFlags
from pite.evaluate.flags import GroundingFlags, TrajectoriesFlags
from pite.evaluate.qa.command import evaluate as evaluate_qa
from pite.evaluate.qa.flags import QaFlags
from pite.evaluate.reports import Report

Flags = GroundingFlags | CaptioningFlags | QaFlags | TrajectoriesFlags

COMMANDS: dict[str, type[Flags]] = {
    "grounding": GroundingFlags,
    "captioning": CaptioningFlags,
    "qa": QaFlags,
    "trajectories": TrajectoriesFlags,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse_command(COMMANDS, argv, "python -m pite.evaluate", __doc__ or "")
    logs.configure(flags.log_level)

    def evaluate() -> None:
        flags.check_paths()
        report = _report(flags)
        print(report.text)
        if flags.metrics is not None:
            write_atomically(flags.metrics, json.dumps(report.metrics(), indent=1) + "\n")

    return run("pite.evaluate", evaluate)


def _report(flags: Flags) -> Report:
    match flags:
        case GroundingFlags():
            return _grounding(flags)
        case CaptioningFlags():
            return _captioning(flags)
        case QaFlags():
            return evaluate_qa(flags)
        case TrajectoriesFlags():
            return _trajectories(flags)


# What imports torch is imported after the flags and paths are checked: it takes seconds.


def _grounding(flags: GroundingFlags) -> Report:
    truth = grounding.read_truth(flags.truth)
    if flags.model is None:
        assert flags.predictions is not None, "GroundingFlags requires it"
        predictions = grounding.read_answers(flags.predictions, truth)
        num_frames = grounding.frames_of(predictions, flags.num_frames, flags.predictions)
    else:
        from pite.evaluate.models import answer_all

        predictions, num_frames = answer_all(flags, truth)
    return grounding.report(predictions, truth, protocol=flags.protocol, num_frames=num_frames)


def _captioning(flags: CaptioningFlags) -> Report:
    truth = captioning.read_truth(*flags.ground_truth)
    predictions = captioning.read_answers(flags.predictions, truth)
    num_frames = grounding.frames_of(predictions, flags.num_frames, flags.predictions)
    return captioning.report(predictions, truth, protocol=flags.protocol, num_frames=num_frames)


def _trajectories(flags: TrajectoriesFlags) -> Report:
    from pite.evaluate.models import trajectories

    return trajectories(flags)


if __name__ == "__main__":
    sys.exit(main())
