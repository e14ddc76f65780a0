"""Scores a prediction file or a model.

python -m pite.evaluate grounding --predictions P.jsonl --ground-truth G.json
python -m pite.evaluate grounding --model DIR --data DIR --store DIR
python -m pite.evaluate trajectories --model DIR --data DIR --store DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dataloaders import logs
from dataloaders.cli import parse_command, run
from dataloaders.files import write_atomically
from pite.evaluate.flags import GroundingFlags, TrajectoriesFlags
from pite.evaluate.grounding import frames_of, read_ground_truth, read_predictions
from pite.evaluate.reports import Report, grounding_report

COMMANDS: dict[str, type[GroundingFlags] | type[TrajectoriesFlags]] = {
    "grounding": GroundingFlags,
    "trajectories": TrajectoriesFlags,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse_command(COMMANDS, argv, "python -m pite.evaluate", __doc__ or "")
    logs.configure(flags.log_level)

    def evaluate() -> None:
        flags.check_paths()
        report, scores = _grounding(flags) if isinstance(flags, GroundingFlags) else _trajectories(flags)
        print(report)
        if flags.scores is not None:
            write_atomically(flags.scores, json.dumps(scores, indent=1) + "\n")

    return run("pite.evaluate", evaluate)


# What imports torch is imported after the flags and paths are checked: it takes seconds.


def _grounding(flags: GroundingFlags) -> Report:
    truth = read_ground_truth(flags.truth)
    if flags.model is None:
        assert flags.predictions is not None, "GroundingFlags requires it"
        predictions = read_predictions(flags.predictions, truth)
        return grounding_report(predictions, truth, frames_of(predictions, flags.num_frames, flags.predictions))
    from pite.evaluate.models import answer_all

    predictions, num_frames = answer_all(flags, truth)
    return grounding_report(predictions, truth, num_frames)


def _trajectories(flags: TrajectoriesFlags) -> Report:
    from pite.evaluate.models import trajectories

    return trajectories(flags)


if __name__ == "__main__":
    sys.exit(main())
