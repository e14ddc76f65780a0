"""Who may import whom: kernels and dataloaders know nobody, pite knows those two, engine knows all three."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "dataloaders": set(),
    "pite": {"kernels", "dataloaders"},
    "engine": {"kernels", "dataloaders", "pite"},
}
ROOMS = {*ALLOWED, "bench", "tests"}
KERNELS_MAY_INSTALL = {"torch", "triton"}


def imported_packages(source: str) -> set[str]:
    """Top-level packages that `source` imports anywhere, functions included; relative imports stay in their package."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.partition(".")[0])
    return packages


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_downwards(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    forbidden = ROOMS - ALLOWED[package] - {package}
    broken = {
        str(file.relative_to(ROOT)): sorted(found)
        for file in files
        if (found := imported_packages(file.read_text()) & forbidden)
    }
    assert not broken


def test_kernels_need_torch_and_triton_only() -> None:
    allowed = KERNELS_MAY_INSTALL | set(sys.stdlib_module_names) | {"kernels"}
    broken = {
        str(file.relative_to(ROOT)): sorted(found)
        for file in sorted((ROOT / "kernels").rglob("*.py"))
        if (found := imported_packages(file.read_text()) - allowed)
    }
    assert not broken


def test_the_check_sees_every_form_of_import() -> None:
    source = "import engine.train as t\nfrom . import x\ndef f():\n    from pite.model import PiTe\n"
    assert imported_packages(source) == {"engine", "pite"}
