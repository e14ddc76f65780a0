"""Measurement tools: the roofline of this machine, interleaved timings, and the correctness gate before any timing."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

Step = Callable[[], Sequence[Tensor]]
PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
    "xformers",
    "peft",
    "transformers",
)


@dataclass(frozen=True)
class Roofline:
    """Measured rates of this device: a large GEMM (FLOP/s) and a large copy (bytes/s)."""

    flops: float
    bandwidth: float

    def floor(self, flops: float, traffic: float) -> float:
        """Lower bound in seconds for this many FLOPs and bytes."""
        return max(flops / self.flops, traffic / self.bandwidth)


@dataclass(frozen=True)
class Timing:
    """Seconds of one implementation: median, 10th and 90th percentile; extra bytes at the peak (CUDA only)."""

    median: float
    low: float
    high: float
    peak_bytes: int | None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measured with random numbers, because a GPU clocks higher on zeros."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(size * size * (16 if device.type == "cuda" else 32), device=device, dtype=dtype)
    target = torch.empty_like(source)
    timings = interleaved({"gemm": lambda: [a @ b], "copy": lambda: [target.copy_(source)]}, device, rounds=40)
    traffic = 2 * source.numel() * source.element_size()
    return Roofline(2 * size**3 / timings["gemm"].low, traffic / timings["copy"].low)


def cpu_clock() -> Callable[[], float]:
    """The clock for CPU timings. With one thread it is CPU time, which does not count other processes on the core."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(steps: Mapping[str, Step], device: torch.device, rounds: int, warmups: int = 2) -> dict[str, Timing]:
    """Time every step once per round, in turn, so that clock changes and other processes affect all of them equally.

    On CUDA each measurement waits behind queued work, so that for kernels of a few microseconds the time is not that of
    the launches from Python.
    """
    clock = cpu_clock()
    for step in steps.values():
        for _ in range(warmups):
            step()
    synchronize(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    for _ in range(rounds):
        for name, step in steps.items():
            if device.type == "cuda":
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                seconds[name].append(_cuda_seconds(step, device))
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
            else:
                start = clock()
                step()
                seconds[name].append(clock() - start)
    return {name: timing(values, peaks.get(name)) for name, values in seconds.items()}


def _cuda_seconds(step: Step, device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)  # about five milliseconds: time for Python to queue what follows
    begin.record()
    step()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1e3


def timing(values: list[float], peak: int | None) -> Timing:
    """Median and deciles of a list of seconds."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return Timing(median(ordered), ordered[tenth], ordered[-1 - tenth], peak)


def gate(ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """None if each result has at most twice plain PyTorch's error (same dtype, against float64), else the reason."""
    for index, (a, b, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        error, plain_error = ((t.double() - exact).abs().max().item() for t in (a, b))
        floor = max(torch.finfo(a.dtype).eps, 2e-6) * max(exact.abs().max().item(), 1e-30)
        if not error <= 2 * plain_error + floor:
            return f"result {index} is off by {error:.3g}; PyTorch in this dtype is off by {plain_error:.3g}"
    return None


def find_sync(step: Callable[[], object], device: torch.device) -> str | None:
    """The error of torch's sync debug mode if a call of `step` synchronizes with the GPU, else None, as on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def environment(device: torch.device) -> dict[str, str]:
    """Device, commit and versions, for the header of a result file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": name, "commit": _commit(), "python": platform.python_version(), **_versions()}


def gpu_details(device: torch.device) -> dict[str, str]:
    """Memory and driver of a GPU; nothing for a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    details = {"memory": f"{properties.total_memory / 1e9:.1f} GB", "cuda": str(torch.version.cuda)}
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return details
    return details | {"driver": driver.split("\n")[0].strip()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
