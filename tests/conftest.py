"""Fixtures of all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from dataloaders.logs import PACKAGES


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Commands set up logging for their process; a test leaves it as it was."""
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in PACKAGES}
    yield
    root.handlers = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
