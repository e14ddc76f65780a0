"""Every kernel test runs with deterministic algorithms on and uninitialized memory filled with NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from pite_kernels import dispatch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpp", "pytorch"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test twice: with the C++ operators and without them."""
    if request.param == "pytorch":
        monkeypatch.setattr(dispatch, "_library", lambda: None)
    elif dispatch._library() is None:
        pytest.skip("the C++ operators are not built")
    return request.param
