"""The command sets up logging for its process, which is the tests' own here."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from dataloaders.logs import PACKAGES


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in PACKAGES}
    yield
    root.handlers = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
