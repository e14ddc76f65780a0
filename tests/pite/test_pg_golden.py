"""The engine reproduces the published PG-Video-LLaVA's numbers, and the check fails for a wrong model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.golden import pg_check

REFERENCE = Path(__file__).resolve().parents[1] / "golden" / "pg_reference"


def test_reference_is_reproduced() -> None:
    checks = list(pg_check.run(REFERENCE))
    kinds = {check.name.replace(":", ".").partition(".")[0].partition(" ")[0] for check in checks}
    cases = {"train_video", "two_turns", "full_size"}
    assert (
        kinds
        == {"frame_indices", "resize", "pixels", "pooling", "pooling_tiny", "learning", "prompt", "greedy"} | cases
    )
    assert [check for check in checks if not check.passed] == []


def test_changed_numbers_are_noticed(tmp_path: Path) -> None:
    """Swapped marks of a video, a slightly wrong projector and another frame index."""
    shutil.copytree(REFERENCE, tmp_path / "reference")
    weights = load_file(tmp_path / "reference" / "model.safetensors")
    weights["model.mm_projector.2.weight"] *= 1.001
    weights["model.embed_tokens.weight"][-2:] = weights["model.embed_tokens.weight"][-2:].flip(0)
    save_file(weights, tmp_path / "reference" / "model.safetensors")
    expected = json.loads((tmp_path / "reference" / "expected.json").read_text())
    expected["frame_indices"]["33"][5] += 1
    (tmp_path / "reference" / "expected.json").write_text(json.dumps(expected))
    failed = {check.name for check in pg_check.run(tmp_path / "reference") if not check.passed}
    assert {"frame_indices of 33: different ones", "two_turns.projected.0", "two_turns.hidden.0"} <= failed
    assert {"train_video.grad.vid_start", "learning.vid_rows_after"} <= failed
    assert "pixels.v0.record" not in failed


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        list(pg_check.run(tmp_path))
