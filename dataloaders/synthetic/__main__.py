"""Make the synthetic world: `python -m dataloaders.synthetic OUT --videos 3400 --seed 0`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from dataloaders import logs
from dataloaders.cli import parse, run
from dataloaders.synthetic.config import SyntheticFlags


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse(SyntheticFlags, argv, prog="python -m dataloaders.synthetic")
    logs.configure(flags.log_level)
    return run("dataloaders.synthetic", lambda: _make(flags))


def _make(flags: SyntheticFlags) -> None:
    flags.check_paths()
    # Imported after the flags and paths are checked, because it imports the encoder.
    from dataloaders.synthetic.world import make_world

    started = time.monotonic()
    made = make_world(flags.output, flags.world(), max(flags.processes, 1), progress=True)
    print(f"{flags.output}: {f'made in {time.monotonic() - started:.0f} s' if made else 'already complete'}")


if __name__ == "__main__":
    sys.exit(main())
