"""Hugging Face has a package `kernels` too: where it is installed, whatever is started ends in one sentence about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_arrows import ROOT


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder as pip leaves it, of a package with names that ours does not have."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("class CUDAProperties: ...\n")
    metadata = tmp_path / "kernels-0.18.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return tmp_path


def python(*arguments: str, path: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


ENTRIES = [
    f"{file.parent.name}.{file.stem}"
    for package in ("engine", "pite")
    for file in sorted((ROOT / package).glob("*.py"))
    if "__main__" in file.read_text()
]


@pytest.mark.parametrize("ours", ["first", "shadowed"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_says_one_sentence(other: Path, ours: str, entry: str):
    path, folder = ([other], ROOT) if ours == "first" else ([other, ROOT], other)
    done = python("-m", entry, "--help", path=path, folder=folder)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "`kernels` 0.18.2" in line and "run `pip uninstall kernels`" in line


@pytest.mark.parametrize(
    ("ours", "program"),
    [
        ("first", "from kernels import linear_cross_entropy"),
        ("first", "import pite.model"),
        ("first", "import engine.train"),
        ("shadowed", "import pite.model"),
        ("shadowed", "import engine.train"),
    ],
)
def test_a_program_gets_an_import_error(other: Path, ours: str, program: str):
    done = python("-c", program, path=[ROOT, other] if ours == "first" else [other, ROOT], folder=other.parent)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and "run `pip uninstall kernels`" in last
