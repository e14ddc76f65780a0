"""The dry run's hours on GPUs are from measurements where there are any, and the line states which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.encode.results import Results, Row
from engine.encode.measured import Rates, hours_on, measured_rates


def test_rates_of_a_device(tmp_path: Path) -> None:
    assert measured_rates("H100", tmp_path) == Rates()
    results = Results.open(tmp_path / "H100" / "encode_h100.json", {"device": "NVIDIA H100 80GB HBM3"})
    results.add("clip", Row("CLIP", "pite", None, 3_000.0))
    results.add("clip", Row("CLIP", "transformers", None, 9_000.0))
    results.add("decode", Row("H.264-360p", "DALI", 7, 90_000.0))
    results.add("decode", Row("H.264-360p", "PyAV", None, 200_000.0))
    assert measured_rates("H100", tmp_path) == Rates(3_000.0, 90_000.0), "PyAV's rate is that of the machine's cores"
    results.add("decode", Row("mixed", "DALI", 7, 40_000.0))
    results.add("decode", Row("mixed", "DALI", 14, problem="not run"))
    assert measured_rates("H100", tmp_path) == Rates(3_000.0, 40_000.0)
    assert measured_rates("A100-80GB", tmp_path) == measured_rates("H200", tmp_path) == Rates()
    assert json.loads(results.path.read_text())["environment"]["device"].startswith("NVIDIA")


def test_hours() -> None:
    """100 frames of each of 143,640 videos of 52 s."""
    frames, seconds = 14_364_000.0, 143_640 * 52.0
    line = hours_on("H100", Rates(3_000.0, 40_000.0), frames, seconds, assumed_clip=1.0)
    assert f"CLIP {frames / 3_000 / 8 / 3600:.3f} h (measured: 3,000 frames/s a GPU)" in line
    assert f"decoding {seconds * 30 / 40_000 / 8 / 3600:.3f} h (measured: 40,000 frames/s a GPU)" in line
    line = hours_on("A100-80GB", Rates(), frames, seconds, assumed_clip=1_100.0)
    assert line.count("assumed, not measured") == 2
    assert float(line.partition("CLIP ")[2].partition(" h")[0]) == pytest.approx(frames / 1_100 / 8 / 3600, abs=1e-3)
    assert "decoding" not in hours_on("A100-80GB", Rates(), 100.0, 0.0, 1_100.0), "stills"
