"""Fixtures of the decoders' tests."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from dataloaders.decode.dali import decoder as dali


class InThisProcess:
    """Workers without processes, which take a second each to start. Not for files that hang or kill their process."""

    def __init__(self, count: int, time_limit: float | None = None) -> None:
        self.count = count

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_result(function(*arguments))
        return answer

    def close(self) -> None:
        """Nothing is to be ended."""


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's decoder probes files and falls back to PyAV in the test's own process."""
    monkeypatch.setattr(dali, "Workers", InThisProcess)
