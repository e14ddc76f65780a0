"""A random model with held-out videos, and a session of it, for all tests of the chat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pite.chat.session import Session
from tests.held_out import make_held_out


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_held_out(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="package")
def loaded(made: Path) -> Session:
    return Session.load(made / "model", clip=f"{made}/clip", device="cpu")


@pytest.fixture
def session(loaded: Session) -> Iterator[Session]:
    """A session without conversations, whose model has not encoded a video."""
    loaded.model.videos.clear()
    yield loaded.fork()


@pytest.fixture(scope="package")
def videos(made: Path) -> list[Path]:
    return sorted((made / "data/evaluation/videos").iterdir())
