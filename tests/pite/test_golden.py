"""The engine reproduces the published model's numbers, and the check that says so can fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.golden.check import run

REFERENCE = Path(__file__).resolve().parents[1] / "golden" / "pite_reference"


def test_reference_is_reproduced() -> None:
    checks = list(run(REFERENCE))
    assert {check.name.partition(":")[0] for check in checks} >= {"stage1_image", "stage2_video", "stage3_video"}
    assert [check for check in checks if not check.passed] == []


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(REFERENCE, tmp_path / "reference")
    weights = load_file(tmp_path / "reference" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(weights, tmp_path / "reference" / "model.safetensors")
    failed = [check.name for check in run(tmp_path / "reference") if not check.passed]
    assert "stage2_video: hidden states" in failed
    assert "stage2_video: gradient of model.layers.1.mlp.down_proj.weight" in failed


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        list(run(tmp_path))
