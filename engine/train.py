"""python -m engine.train --stage 1|2|3|all --model tiny|7b|13b --data DIR --store DIR --output DIR

Each stage starts from the previous one, with its LoRA merged and a new LoRA on top, and writes OUTPUT/stageN/final. The
same command resumes an interrupted run, and reports a finished one as done.
"""

from __future__ import annotations

import sys

from dataloaders import logs
from dataloaders.cli import parse, print_on_rank0
from dataloaders.errors import sentence
from dataloaders.ranks import Ranks
from engine.config import TrainConfig
from engine.distributed.errors import exit_process
from engine.preemption import remove_marker
from engine.preflight import check_paths


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error."""
    config = parse(TrainConfig, argv, prog="python -m engine.train")
    logs.configure(config.run.log_level)
    if config.run.dry_run:
        from engine.budget.__main__ import estimate

        return estimate(config, "engine.train")
    try:
        if Ranks.read().rank == 0:
            remove_marker(config.run.output)
        check_paths(config)
    except (ValueError, OSError) as error:
        if print_on_rank0("engine.train", sentence(error)):
            return 1
        # Rank 0 does not have this error: it is raised on all ranks once they have joined.
    # Imported here, since it imports torch: the checks above answer at once.
    from engine.job import run_job

    return run_job(config)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
