"""The encoding benchmark: its output on a CPU, and its projection."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import encode, media
from bench.clip import CLIPS, OURS, ClipRow
from bench.encode import DALI, PYAV, Row, projection
from bench.report import encoding
from tests.clips import save_clip
from tests.media import needs_dali


@needs_dali
def test_one_call_measures_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode, "CPU", replace(encode.CPU, kinds=(("VP9", "360p"),)))
    for module in (encode, media):
        monkeypatch.setattr(module, "FRAMES", 120)
    save_clip(tmp_path / "clip")
    output = tmp_path / "results.json"
    assert encode.main(["--device", "cpu", "--clip", str(tmp_path / "clip"), "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    decode = {row["implementation"]: row for row in content["decode"]}
    assert decode[encode.BARE]["problem"] and decode[DALI]["frames_per_second"] > 0 < decode[PYAV]["frames_per_second"]
    assert {row["implementation"] for row in content["clip"] if row["problem"] is None} == set(CLIPS)
    (whole,) = content["encode"]
    # On a busy machine the smaller run may take longer than the larger one, because the start-up dominates.
    assert whole["frames_per_second"] > 0 if whole["problem"] is None else "too few to measure" in whole["problem"]
    assert content["projection"] is None, "there is no projection from a CPU"
    assert encoding(output) == content
    printed = capsys.readouterr().out
    assert "| VP9-360p: DALI |" in printed and "NVDEC: " in printed


def test_projection() -> None:
    """An H100 that decodes 140,000 frames/s on seven NVDEC engines and encodes 10,000 frames/s at 989 TFLOP/s."""
    decode = [Row("a", DALI, 140_000.0), Row("b", DALI, 200_000.0), Row("a", PYAV, 1.0)]
    hours = projection("NVIDIA H100 80GB HBM3", decode, [ClipRow(OURS, 10_000.0)])
    assert hours is not None
    assert hours["clip_hours"] == pytest.approx(143_640 / (8 * 100 * 312 / 989) / 3600, rel=1e-3)
    assert hours["decode_hours"] == pytest.approx(143_640 / (8 * 100_000 / 1560) / 3600, rel=1e-3)
    assert hours["hours"] == max(hours["clip_hours"], hours["decode_hours"])
    assert projection("AMD EPYC", decode, [ClipRow(OURS, 1.0)]) is None
    assert projection("NVIDIA H100", [Row("a", DALI, problem="no NVDEC")], [ClipRow(OURS, 1.0)]) is None
