"""kernels/setup.py builds the C++ operators if possible, and prints one notice otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pite_kernels import dispatch

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    variables = os.environ | environment
    return subprocess.run(
        command, cwd=ROOT / "kernels", env=variables, capture_output=True, text=True, check=False, timeout=300
    )


def test_without_a_compiler_one_notice_and_success(tmp_path):
    done = build(tmp_path, CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stderr.splitlines() if line.startswith("pite_kernels:")]
    assert len(notices) == 1
    assert "PyTorch is used instead" in notices[0] and "build.log" in notices[0]
    assert not list(tmp_path.rglob("_C.so"))


def test_builds_a_library_that_loads(tmp_path):
    if dispatch._library() is None:
        pytest.skip("the C++ operators are not built")
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    library = tmp_path / "pite_kernels" / "_C.so"
    assert library.exists(), done.stderr
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.pite_kernels_cpu.trajectory_forward)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pite_kernels_cpu.trajectory_forward" in loaded.stdout, loaded.stderr


def test_a_library_that_does_not_load_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    assert dispatch._library.__wrapped__() is None
    assert "does not load" in caplog.text and "setup.py" in caplog.text


def test_a_library_of_older_sources_is_a_warning(monkeypatch, caplog):
    if dispatch._library() is None:
        pytest.skip("the C++ operators are not built")
    monkeypatch.setattr(dispatch, "OPERATORS", (*dispatch.OPERATORS, "from_tomorrow"))
    assert dispatch._library.__wrapped__() is None
    assert "from_tomorrow" in caplog.text and "rebuild" in caplog.text


def test_the_library_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("PITE_KERNELS_CPP", "0")
    assert dispatch._library.__wrapped__() is None
