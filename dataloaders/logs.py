"""Logging of the commands: one handler on stderr, set up once per process, with time, level and rank."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Literal

from dataloaders.ranks import Ranks

LogLevel = Literal["debug", "info", "warning", "error"]

PACKAGES = ("engine", "pite", "dataloaders", "pite_kernels", "bench")


@dataclass(frozen=True, kw_only=True)
class LogFlags:
    """The flag that each command has; base class of its flags."""

    log_level: LogLevel = "info"
    """lowest level of the log messages on stderr"""


def configure(level: LogLevel = "info") -> None:
    """Print the log records of our packages on stderr, from `level` on; of other packages, warnings and errors.

    Of several ranks, rank 0 prints all records, the others warnings and errors, each with its rank.
    """
    ranks = Ranks.read()
    rank = f"rank {ranks.rank}: " if ranks.size > 1 else ""
    handler = _Handler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {rank}%(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [each for each in root.handlers if not isinstance(each, _Handler)] + [handler]
    number = logging.getLevelNamesMapping()[level.upper()]
    for package in PACKAGES:
        logging.getLogger(package).setLevel(max(number, logging.WARNING) if ranks.rank else number)


class _Handler(logging.Handler):
    """Writes above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as logging's own handlers: a record that cannot be written does not end the run
            self.handleError(record)
