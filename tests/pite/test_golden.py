"""The engine reproduces the published model's numbers, and the check fails for a wrong model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pite.checkpoint import save_pretrained
from tests.golden.check import load_model, pack, run
from tests.samples import tiny_model

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


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_missing_head_counts_are_found(tmp_path: Path, kv_heads: int) -> None:
    model = tiny_model(kv_heads, lora=False)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    lost = {"num_attention_heads": {}, "num_key_value_heads": {}, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config | lost))
    frames, channels = model.config.num_frames, model.config.vision_feature_size
    numbers = {"stage": 3, "lens": [6], "frames": frames}
    cases = {
        "case.input_ids": torch.tensor([[1, -200, 5, 6, 7, 8]]),
        "case.labels": torch.tensor([[-100, -100, -100, 6, 7, 8]]),
        "case.videos": torch.randn(1, frames, channels, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        cases["case.hidden.0"] = model.hidden_states(pack("case", cases, numbers), all_rows=True)
    found = load_model(tmp_path, cases, {"case": numbers}).config.llm
    assert (found.num_attention_heads, found.num_key_value_heads) == (4, kv_heads)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        list(run(tmp_path))
