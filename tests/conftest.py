"""Fixtures of all tests."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest

from dataloaders.logs import PACKAGES


@pytest.fixture(autouse=True, scope="session")
def imports_frozen() -> Iterator[None]:
    """A training run collects garbage before its first step and at its end. In a process with all imports and tests that
    scans a million objects, so what a run has frozen stays frozen."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Commands set up logging for their process; a test leaves it as it was."""
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in PACKAGES}
    yield
    root.handlers = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
