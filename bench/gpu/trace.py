"""A profile of one training step: a trace for a viewer, and the device's busy share and kernels by time."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import synchronize

TOP = 25
"""Kernels in the table; the rest are summed."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that occupy a GPU."""


def record(step: Callable[[], Any], device: torch.device, activities: Iterable[ProfilerActivity], path: Path) -> None:
    """Write a Chrome trace of one call of `step`, compressed if `path` ends in .gz."""
    synchronize(device)
    with profile(activities=list(activities)) as profiler:
        step()
        synchronize(device)
    profiler.export_chrome_trace(str(path))


def events_of(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace that have a duration; "ts" and "dur" are in microseconds."""
    content = path.read_bytes()
    trace = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def device_times(events: Iterable[Mapping[str, Any]], categories: tuple[str, ...] = ON_DEVICE) -> dict[str, Any]:
    """What occupied the device: seconds from its first event to its last, busy and idle shares, launches, kernels.

    categories  of the events that count; those of a CPU are "cpu_op"
    """
    chosen = [event for event in events if event.get("cat") in categories]
    if not chosen:
        return {"seconds": 0.0, "busy": None, "idle": None, "launches": 0, "kernels": []}
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in chosen)
    seconds = (max(end for _, end in spans) - spans[0][0]) / 1e6
    busy = covered(spans) / 1e6 / seconds if seconds else 1.0
    return {
        "seconds": seconds,
        "busy": busy,
        "idle": 1 - busy,
        "launches": len(chosen),
        "kernels": by_name(chosen),
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals, which are sorted by their beginning: streams may overlap."""
    total, until = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def by_name(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Total milliseconds and calls of the TOP kernels, longest first, and of all others together."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        times[event["name"]].append(event["dur"] / 1e3)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    rows = [{"name": name, "ms": sum(each), "calls": len(each)} for name, each in ranked[:TOP]]
    rest = [duration for _, each in ranked[TOP:] for duration in each]
    return rows + ([{"name": f"{len(ranked) - TOP} others", "ms": sum(rest), "calls": len(rest)}] if rest else [])


def profile_step(step: Callable[[], Any], device: torch.device, trace: Path) -> dict[str, Any]:
    """Write `trace` and return `device_times`.

    On a GPU the times are from another call in which only the device is recorded: recording the host's operations slows
    the launches, and the device would wait for them.
    """
    step()
    if device.type != "cuda":
        record(step, device, [ProfilerActivity.CPU], trace)
        return device_times(events_of(trace), ("cpu_op",))
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "device.json"
        record(step, device, [ProfilerActivity.CUDA], alone)
        times = device_times(events_of(alone))
    record(step, device, [ProfilerActivity.CPU, ProfilerActivity.CUDA], trace)
    return times
