"""The two distributions pite-kernels and pite-engine; neither conflicts with Hugging Face's package `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.engine.workspace import make_workspace, train_arguments
from tests.test_arrows import ROOT

PACKAGES = {"kernels": {"pite_kernels"}, ".": {"dataloaders", "pite", "engine"}}
"""Folder of a distribution -> the packages that it installs."""


def run(*command: object, path: tuple[Path, ...] = (), folder: Path = ROOT) -> str:
    """The output of a command, run with only `path` on PYTHONPATH."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=variables, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of each distribution, built from a copy of its folder, without the C++ operators."""
    built = {}
    for folder in PACKAGES:
        source, output = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
        ignored = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "*.so", "tests")
        shutil.copytree(ROOT / folder, source, ignore=ignored)
        command = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
        variables = {**os.environ, "CXX": "/no/such/compiler"}
        subprocess.run(
            [sys.executable, "-c", command, output], cwd=source, env=variables, capture_output=True, check=True
        )
        (built[folder],) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both wheels unpacked, as pip does it."""
    folder = tmp_path_factory.mktemp("installed")
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with a fake package `kernels`, from which any name can be imported, and with its pip metadata."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def __getattr__(name): return type(name, (), {})\n")
    metadata = tmp_path / "kernels-0.17.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    return tmp_path


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_wheel_installs_only_its_own_packages(wheels: dict[str, Path], folder: str) -> None:
    names = zipfile.ZipFile(wheels[folder]).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES[folder]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_files_of_the_web_page_are_installed(installed: Path) -> None:
    names = {file.relative_to(ROOT) for pattern in ("*.js", "*.css") for file in (ROOT / "pite").rglob(pattern)}
    assert names
    assert not [name for name in names if not (installed / name).is_file()]


def test_no_file_is_in_both_wheels(wheels: dict[str, Path]) -> None:
    """So that uninstalling one does not break the other."""
    ours, engine = (set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels.values())
    assert not ours & engine


def test_the_engine_requires_the_kernels(wheels: dict[str, Path]) -> None:
    archive = zipfile.ZipFile(wheels["."])
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    assert "Requires-Dist: pite-kernels" in archive.read(metadata).decode().splitlines()


def test_the_kernels_work_without_the_engine(wheels: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels["kernels"]) as archive:
        archive.extractall(tmp_path / "only")
    code = (
        "import torch, pite_kernels as k; q = torch.randn(3, 2, 8); b = torch.tensor([0, 1, 3], dtype=torch.int32);"
        "print(k.__file__, k.packed_attention(q, q, q, b, 2).shape)"
    )
    output = run(sys.executable, "-c", code, path=(tmp_path / "only",), folder=tmp_path)
    assert output.startswith(str(tmp_path / "only")) and "3, 2, 8" in output


def test_an_installed_engine_trains_from_any_folder(installed: Path, tmp_path: Path) -> None:
    """With torchrun, two ranks and spawned tokenizer processes."""
    workspace = make_workspace(tmp_path / "workspace")
    arguments = train_arguments(workspace, tmp_path / "run", "1", max_steps=1, token_budget=2000)
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    run(*launch, "engine.train", *arguments, path=(installed,), folder=tmp_path)
    assert (tmp_path / "run" / "stage1" / "metrics.jsonl").read_text()


def test_an_installed_engine_has_the_parts_that_the_demo_starts_from(installed: Path) -> None:
    folder = ROOT / "engine" / "tiny" / "parts"
    parts = [file.relative_to(ROOT) for file in folder.rglob("*") if file.is_file()]
    assert {Path("engine/tiny/parts/clip/tiny.json"), Path("engine/tiny/parts/vicuna/tiny.json")} <= set(parts)
    assert all((installed / part).read_bytes() == (ROOT / part).read_bytes() for part in parts)


def test_hugging_faces_kernels_keeps_its_name(other: Path) -> None:
    """Imported in the source tree, where our folder `kernels` is not a package, together with our packages."""
    code = (
        "import sys; sys.path.insert(0, '.'); import kernels; from kernels import CUDAProperties;"
        "import pite_kernels, pite.model, engine.train;"
        "from transformers.utils import is_kernels_available; print(kernels.__file__, is_kernels_available())"
    )
    output = run(sys.executable, "-c", code, path=(ROOT, ROOT / "kernels", other))
    assert output.split()[0] == str(other / "kernels" / "__init__.py")


def test_our_folder_kernels_is_not_mistaken_for_hugging_faces() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); import pite.model;"
        "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    )
    assert run(sys.executable, "-c", code, path=(ROOT, ROOT / "kernels")).split() == ["False"]
