"""Estimate the cost of a run before it starts: `python -m engine.budget` takes the flags of engine.train.

It prints parameters, tokens, FLOPs, memory per device and hours, and needs neither weights nor data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataloaders import logs, paths
from dataloaders.cli import parse
from dataloaders.ranks import Ranks
from engine.config import DataConfig, TrainConfig

ABOUT = """Estimate parameters, tokens, FLOPs, memory per device and hours of a training run, without starting it.

The flags are those of engine.train; neither weights nor data have to be there."""


def estimate(config: TrainConfig, program: str = "engine.budget") -> int:
    """Print the dry run; returns the exit status. The same for all ranks of torchrun: rank 0 prints it."""
    if Ranks.read().rank:
        return 0
    try:
        if not config.data.folder.is_dir() and config.data.folder != DataConfig.folder:
            paths.input_folder("--data", config.data.folder)
        paths.input_folder("--transcripts", config.data.transcripts)
        # Imported here, since they import torch.
        from engine.budget.costs import run_costs
        from engine.budget.text import report

        print(report(run_costs(config), 2 if config.parallel.reduce_dtype == "bfloat16" else 4))
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the same as `engine.train --dry-run`."""
    config = parse(TrainConfig, argv, prog="python -m engine.budget", about=ABOUT)
    logs.configure(config.run.log_level)
    return estimate(config)


if __name__ == "__main__":
    sys.exit(main())
