"""What the code imports is what requirements.txt lists, and setup.py installs."""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_arrows import ALLOWED, ROOT, imported_packages

OPTIONAL = {"nvidia", "torchcodec", "cv2", "stanza"}
"""Decoders that are used where they are installed, and what annotation alone takes."""

# Imported by name, by transformers for Vicuna's tokenizer, or by torch for the curves.
WITHOUT_AN_IMPORT = {"liger-kernel", "sentencepiece", "protobuf", "tensorboard"}


@pytest.fixture
def installed(monkeypatch) -> dict[str, Requirement]:
    """What setup.py has pip install, by name."""
    asked: dict[str, list[str]] = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    runpy.run_path(str(ROOT / "setup.py"))
    requirements = [Requirement(line) for line in asked["install_requires"]]
    return {canonicalize_name(r.name): r for r in requirements}


def test_whatever_is_imported_is_listed_and_nothing_else(installed: dict[str, Requirement]) -> None:
    known = set(sys.stdlib_module_names) | set(ALLOWED) | OPTIONAL
    imported = {
        name
        for package in ALLOWED
        for file in (ROOT / package).rglob("*.py")
        for name in imported_packages(file.read_text()) - known
    }
    owners = packages_distributions()
    listed_for = {name: {canonicalize_name(owner) for owner in owners[name]} & installed.keys() for name in imported}
    assert not [name for name, owner in listed_for.items() if not owner]
    assert set().union(*listed_for.values()) | WITHOUT_AN_IMPORT == installed.keys()


def test_setup_reads_the_first_half_of_the_file(installed: dict[str, Requirement]) -> None:
    lines = Path(ROOT / "requirements.txt").read_text().splitlines()
    tools = lines.index("# tests and benchmarks")
    listed = {canonicalize_name(Requirement(line).name) for line in lines[:tools] if line and line[0] != "#"}
    assert installed.keys() == listed
    assert "pytest" not in installed


def test_no_version_is_let_in_that_lacks_what_we_call(installed: dict[str, Requirement]) -> None:
    assert not installed["liger-kernel"].specifier.contains("0.8.1")  # LigerFusedGateUpSiLUMulFunction
    assert installed["liger-kernel"].specifier.contains("0.8.2")


def test_what_the_tests_run_with_is_let_in(installed: dict[str, Requirement]) -> None:
    pinned = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    versions = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in pinned}
    assert all(r.specifier.contains(versions[name]) for name, r in installed.items())
