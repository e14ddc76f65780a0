"""Ground an answer: `python -m pite.ground --video V --query Q --model DIR --output DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataloaders import logs
from dataloaders.cli import parse, run
from pite.ground.flags import GroundFlags


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse(GroundFlags, argv, prog="python -m pite.ground")
    logs.configure(flags.log_level)

    def ground() -> None:
        flags.check_paths()
        # Imported after the flags and paths are checked: it takes seconds.
        from pite.ground.command import ground

        ground(flags)

    return run("pite.ground", ground)


if __name__ == "__main__":
    sys.exit(main())
