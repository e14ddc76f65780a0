"""Scores a prediction file or a model.

python -m pite.evaluate grounding --predictions P.jsonl --ground-truth G.json
python -m pite.evaluate grounding --model DIR --data DIR --store DIR --predictions P.jsonl
python -m pite.evaluate captioning --predictions P.jsonl --ground-truth val_1.json val_2.json
python -m pite.evaluate qa --benchmark msvd_qa --predictions P.jsonl --ground-truth test_qa.json --judge-url URL ...
python -m pite.evaluate spatial --benchmark hc_stvg --predictions P.jsonl --ground-truth val_v2.json
python -m pite.evaluate spatial --benchmark hc_stvg --model DIR --videos DIR --predictions P.jsonl --ground-truth val_v2.json
python -m pite.evaluate trajectories --model DIR --data DIR --store DIR
python -m pite.evaluate all --model DIR --data DIR --store DIR --output DIR

Several GPUs: torchrun --nproc-per-node 8 -m pite.evaluate grounding ... --predictions P.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

from dataloaders import logs
from dataloaders.cli import parse_command, run
from dataloaders.files import write_atomically
from dataloaders.ranks import Ranks
from pite.evaluate.all_benchmarks import AllFlags, score_all
from pite.evaluate.captioning.flags import CaptioningFlags
from pite.evaluate.commands import score_answers, score_trajectories
from pite.evaluate.flags import EvaluationFlags, GroundingFlags, TrajectoriesFlags
from pite.evaluate.processes import joined
from pite.evaluate.qa.flags import QaFlags
from pite.evaluate.reports import Report
from pite.evaluate.spatial.command import score_boxes
from pite.evaluate.spatial.flags import SpatialFlags

COMMANDS: dict[str, tuple[type[EvaluationFlags], Callable[..., Report | None]]] = {
    "grounding": (GroundingFlags, score_answers),
    "captioning": (CaptioningFlags, score_answers),
    "qa": (QaFlags, score_answers),
    "spatial": (SpatialFlags, score_boxes),
    "trajectories": (TrajectoriesFlags, score_trajectories),
    "all": (AllFlags, score_all),
}
"""Name -> its flags, and the function from flags and ranks to a report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse_command(
        {name: kind for name, (kind, _) in COMMANDS.items()}, argv, "python -m pite.evaluate", __doc__
    )
    logs.configure(flags.log_level)
    score = next(function for kind, function in COMMANDS.values() if kind is type(flags))
    return run("pite.evaluate", lambda: evaluate(flags, score))


def evaluate(flags: EvaluationFlags, score: Callable[[EvaluationFlags, Ranks], Report | None]) -> None:
    """Check the paths, score, print the report, and write the file of --metrics."""
    flags.check_paths()
    with joined() as ranks:
        report = score(flags, ranks)
    if report is None:
        return
    print(report.text)
    if flags.metrics is not None:
        write_atomically(flags.metrics, json.dumps(report.metrics(), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
