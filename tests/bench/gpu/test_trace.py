"""The profile of a step: busy and idle shares, kernels by time."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from bench.gpu import trace
from bench.gpu.trace import TOP, device_times, events_of, profile_step


def event(name: str, begin: float, duration: float, category: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration}


def test_streams_overlap_and_the_host_does_not_count(tmp_path):
    events = [
        event("gemm", 1000, 300),
        event("norm", 1100, 100),  # on another stream, within the first
        event("gemm", 1250, 150),
        event("copy", 1900, 100, "gpu_memcpy"),
        event("aten::mm", 0, 5000, "cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]
    for path in (tmp_path / "a.json", tmp_path / "b.json.gz"):
        content = json.dumps({"traceEvents": events}).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        times = device_times(events_of(path))
        assert times["seconds"] == pytest.approx(1000e-6)
        assert times["busy"] == pytest.approx(0.5) and times["idle"] == pytest.approx(0.5)
        assert times["launches"] == 4
        assert [(k["name"], k["calls"]) for k in times["kernels"]] == [("gemm", 2), ("norm", 1), ("copy", 1)]
        assert times["kernels"][0]["ms"] == pytest.approx(0.45)


def test_all_kernels_after_the_first_are_summed():
    kernels = device_times([event(f"k{i}", 100 * i, 50 - i) for i in range(TOP + 3)])["kernels"]
    assert [kernel["name"] for kernel in kernels[-2:]] == [f"k{TOP - 1}", "3 others"]
    assert kernels[-1]["calls"] == 3 and kernels[-1]["ms"] == pytest.approx((25 + 24 + 23) / 1e3)


def test_an_empty_trace_has_no_shares():
    assert device_times([])["busy"] is None


def test_a_step_on_a_cpu_is_traced(tmp_path):
    a = torch.ones(64, 64)
    times = profile_step(lambda: a @ a, torch.device("cpu"), tmp_path / "trace.json.gz")
    assert "aten::mm" in {kernel["name"] for kernel in times["kernels"]} and 0 < times["busy"] <= 1
    assert events_of(tmp_path / "trace.json.gz")


def test_on_a_gpu_the_shares_are_from_a_step_without_the_host(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Recording the host's operations slows the launches: the device looks idle."""

    def record(step, device, activities, path):
        names = [activity.name for activity in activities]
        events = [event("gemm", 0, 90), event("gemm", 100 if names == ["CUDA"] else 910, 90)]
        path.write_text(json.dumps({"traceEvents": events, "activities": names}))

    monkeypatch.setattr(trace, "record", record)
    times = profile_step(lambda: None, torch.device("cuda"), tmp_path / "trace.json")
    assert times["busy"] == pytest.approx(180 / 190) and times["launches"] == 2
    assert json.loads((tmp_path / "trace.json").read_text())["activities"] == ["CPU", "CUDA"]
