"""A file in OUTPUT that exists only where the last run was asked to stop, saved, and has more to do.

A job script queues itself again where the file exists, and so not after an error or at the end of the training.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from dataloaders.files import write_atomically

MARKER = "preempted.json"
"""Name of the file: {"stage": which one the same command continues, "step": optimizer steps of it that are saved}."""


def write_marker(output: Path, stage: int, step: int) -> None:
    write_atomically(output / MARKER, json.dumps({"stage": stage, "step": step}) + "\n")


def remove_marker(output: Path) -> None:
    """Remove what an earlier run left, if anything; an `output` that is no folder is reported elsewhere."""
    with suppress(NotADirectoryError):
        (output / MARKER).unlink(missing_ok=True)
