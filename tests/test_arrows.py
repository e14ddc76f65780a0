"""Structure of the source tree: allowed imports, no cycles, no paths into other packages, short files and functions."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED: dict[str, set[str]] = {
    "pite_kernels": set(),
    "dataloaders": set(),
    "pite": {"pite_kernels", "dataloaders"},
    "engine": {"pite_kernels", "dataloaders", "pite"},
}
"""Package -> our packages that it may import."""

FOLDERS = {name: ROOT / name for name in (*ALLOWED, "bench", "tests")} | {
    "pite_kernels": ROOT / "kernels" / "pite_kernels"
}
KERNELS_REQUIRE = {"torch", "triton"}

LONGEST_FILE = 400
LONGEST_FUNCTION = 60
LONG_FUNCTIONS = {
    "pite_kernels.gpu.trajectory_kernels.trajectory_l1_fwd_kernel": "one tile from load to store; JIT functions inline",
    "pite_kernels.gpu.lora.lora_bwd_thin_products_kernel": "its row programs and column programs run at the same time",
    "pite_kernels.gpu.cross_entropy.forward": "the chunk loop: each buffer is allocated, filled and reused in sequence",
    "pite_kernels.cross_entropy.cross_entropy_forward": "the same loop without Triton, in the same order",
}
"""Longer functions -> the reason."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for all packages except the tests."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py") if package != "tests" else ():
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imported(source: str) -> set[str]:
    """Dotted names that `source` imports, also inside functions; for `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_packages(source: str) -> set[str]:
    """Top-level packages that `source` imports."""
    return {name.partition(".")[0] for name in imported(source)}


def imported_modules(file: Path) -> set[str]:
    """Our modules that a file imports; for `from package import module` only the module."""
    names = imported(file.read_text())
    found = names & modules().keys()
    return {m for m in found if not (file_is_package(m) and any(other.startswith(f"{m}.") for other in found))}


def file_is_package(module: str) -> bool:
    return modules()[module].name == "__init__.py"


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_downwards(package: str) -> None:
    files = sorted(FOLDERS[package].rglob("*.py"))
    assert files
    forbidden = FOLDERS.keys() - ALLOWED[package] - {package}
    broken = {
        str(file.relative_to(ROOT)): sorted(found)
        for file in files
        if (found := imported_packages(file.read_text()) & forbidden)
    }
    assert not broken


def test_kernels_require_torch_and_triton_only() -> None:
    allowed = KERNELS_REQUIRE | set(sys.stdlib_module_names) | {"pite_kernels"}
    broken = {
        str(file.relative_to(ROOT)): sorted(found)
        for file in sorted(FOLDERS["pite_kernels"].rglob("*.py"))
        if (found := imported_packages(file.read_text()) - allowed)
    }
    assert not broken


def test_there_is_no_import_cycle() -> None:
    graph = {name: imported_modules(file) - {name} for name, file in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", ALLOWED)
def test_no_package_reads_files_outside_its_own(package: str) -> None:
    """An installed package may be alone: it must import what it needs, or get paths as arguments."""
    leaves = re.compile(r"__file__\)[\w.()]*\.parents\[|__file__\)(\.resolve\(\))?\.parent\.parent")
    assert not [str(file) for file in FOLDERS[package].rglob("*.py") if leaves.search(file.read_text())]


def test_commands_hand_no_functions_of_their_own_to_processes() -> None:
    """A spawned process does not import PACKAGE.__main__, so it would not find them."""
    broken = []
    for name, file in modules().items():
        if not name.endswith(".__main__"):
            continue
        tree = ast.parse(file.read_text())
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("submit", "map")
            ):
                broken += [f"{name}: {n.id}" for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in own]
    assert not broken


def test_files_are_short() -> None:
    files = [file for folder in FOLDERS.values() for file in folder.rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert not {file: length for file, length in lengths.items() if length > LONGEST_FILE}


def test_functions_are_short() -> None:
    long = set()
    for module, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                long.add(f"{module}.{node.name}")
    assert long == LONG_FUNCTIONS.keys()


def test_every_form_of_import_is_found() -> None:
    source = "import engine.train as t\nfrom . import x\ndef f():\n    from pite.model import PiTe\n"
    assert imported_packages(source) == {"engine", "pite"}
    assert {"engine.train", "pite.model"} <= imported(source)
