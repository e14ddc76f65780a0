"""One METEOR process for all tests: it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from pite.evaluate.captioning import java, scores


@pytest.fixture(scope="session")
def meteor() -> Iterator[java.Meteor]:
    with java.Meteor() as process:
        yield process


@pytest.fixture
def shared_meteor(meteor: java.Meteor, monkeypatch: pytest.MonkeyPatch) -> java.Meteor:
    """Scores use the process of all tests instead of one of their own."""
    monkeypatch.setattr(scores, "Meteor", lambda: nullcontext(meteor))
    return meteor
