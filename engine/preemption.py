"""A marker file in OUTPUT. It exists only if the last run got a signal to stop, saved, and has more to do.

A job script queues itself again if the file exists; so it does not after an error or at the end of the training.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from dataloaders.files import write_atomically

MARKER = "preempted.json"
"""Name of the file. It holds {"stage": the last stage that saved, "step": its optimizer steps}."""


def write_marker(output: Path, stage: int, step: int) -> None:
    write_atomically(output / MARKER, json.dumps({"stage": stage, "step": step}) + "\n")


def remove_marker(output: Path) -> None:
    """Remove the marker of an earlier run, if there is one. Other code reports an `output` that is not a folder."""
    with suppress(NotADirectoryError):
        (output / MARKER).unlink(missing_ok=True)
