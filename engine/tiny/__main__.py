"""Trains the demo's two initial models: `python -m engine.tiny OUT` writes OUT/clip and OUT/vicuna in HF format."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from dataloaders import logs
from dataloaders.cli import parse, run
from engine.tiny.config import TinyFlags


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse(TinyFlags, argv, prog="python -m engine.tiny")
    logs.configure(flags.log_level)
    return run("engine.tiny", lambda: _train(flags))


def _train(flags: TinyFlags) -> None:
    flags.check_paths()
    # Imported after the flags and paths are checked: it takes seconds.
    from engine.tiny.models import make_tiny

    started = time.monotonic()
    lines = make_tiny(flags.output, flags.training, flags.log_level)
    for line in lines:
        print(line)
    print(f"{flags.output}: {f'made in {time.monotonic() - started:.0f} s' if lines else 'already complete'}")


if __name__ == "__main__":
    sys.exit(main())
