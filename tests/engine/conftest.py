from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import job
from tests.clips import save_clip
from tests.engine.workspace import make_pg_workspace, make_workspace


@pytest.fixture(autouse=True, scope="session")
def no_pictures() -> Iterator[None]:
    """A stage ends without losses.png, which takes a third of a tiny run; test_validation.py has it drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "plot_losses", lambda stages, output: None)
        yield


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def pg_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pg_workspace(tmp_path_factory.mktemp("pg_workspace"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clip")
    save_clip(directory)
    return directory
