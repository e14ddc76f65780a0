"""`python -m bench.gpu`: all GPU tests and benchmarks in one call from the source tree.

1. Runs the kernel tests on the device.
2. Checks that no step of ours synchronizes with the GPU.
3. Times every case against its peers and writes bench/results/<device>.json.
4. Times training steps of 7B and 13B (`bench.step`).

With PYTHONPATH=.:kernels nothing needs to be installed or built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.kernels.cases import IMPLEMENTATIONS, OURS
from bench.kernels.inputs import Case, Inputs, cpu_cases, gpu_cases
from bench.kernels.rows import Checked, Row, measure
from bench.kernels.tiles import measure_tiles
from bench.measure import environment, roofline
from bench.step.__main__ import TOGETHER, UNSLOTH
from bench.step.loop import find_loop_sync
from bench.step.problem import make_problem, tiny_shape

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parents[1] / "tests" / "kernels"


def kernel_tests(device: torch.device) -> str | None:
    """None if the Triton checks in tests/kernels pass (on a CPU: in Triton's interpreter), else the end of their output."""
    environment = os.environ | ({} if device.type == "cuda" else {"TRITON_INTERPRET": "1"})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        *(str(TESTS / name) for name in ("triton_checks.py", "triton_lora_checks.py", "rope_checks.py")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parents[1], check=False)
    return None if done.returncode == 0 else done.stdout[-3000:] + done.stderr[-1000:]


def find_host_sync(case: Case, device: torch.device) -> str | None:
    """The error of torch's sync debug mode if a step of ours synchronizes with the GPU, else None."""
    step = IMPLEMENTATIONS[case.op][OURS](Inputs(case, device))
    step()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def run_step(*options: str) -> int:
    """Run `bench.step` in its own process, so that its memory is freed at the end; returns the exit status."""
    return subprocess.run([sys.executable, "-m", "bench.step", *options], check=False).returncode


def training_steps(device: torch.device) -> None:
    """Time all implementations of a training step in one process, or one process each if they do not fit together."""
    for model in ("7b", "13b") if device.type == "cuda" else ("tiny",):
        chosen = "--model", model, "--device", device.type
        if run_step(*chosen):
            for implementation in TOGETHER:
                run_step(*chosen, "--only", implementation)
        run_step(*chosen, "--only", UNSLOTH)


def show(rows: list[Row]) -> None:
    print(rows[0].case)
    for row in rows:
        if row.median_ms is None:
            print(f"  {row.implementation:24} {row.problem}")
        else:
            share = "" if row.roofline_share is None else f"  {row.roofline_share:6.1%} of the roofline"
            print(f"  {row.implementation:24} {row.median_ms:9.3f} ms{share}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script on small shapes")
    parser.add_argument("--rounds", type=int, default=30, help="timings per implementation")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--skip-tests", action="store_true", help="do not run tests/kernels first")
    parser.add_argument("--skip-steps", action="store_true", help="do not time training steps")
    parser.add_argument("--output", type=Path, help="result file; default: bench/results/<device>.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; use --device cpu to try the script on small shapes")
    failures = None if options.skip_tests else kernel_tests(device)
    if failures:
        print(failures, "\nThe kernel tests failed: nothing is timed.")
        return 1
    cases = [c for c in (gpu_cases() if device.type == "cuda" else cpu_cases()) if options.only in c.name]
    if not cases:
        parser.error(f"--only {options.only!r} matches no case")
    described = environment(device)
    path = options.output or RESULTS / f"{described['device'].split(',')[0].replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    syncs = {c.name: find_host_sync(c, device) for c in cases} if device.type == "cuda" else {}
    if device.type == "cuda":
        syncs["engine.loop.train"] = find_loop_sync(make_problem(tiny_shape(), device, torch.bfloat16, 16, 2048))
    roof = roofline(device, cases[0].dtype)
    print(f"roofline: {roof.flops / 1e12:.1f} TFLOP/s, {roof.bandwidth / 1e9:.0f} GB/s")
    content: dict[str, Any] = {
        "environment": described,
        "roofline": {"tflops": roof.flops / 1e12, "gbps": roof.bandwidth / 1e9},
        "host_waits": {name: error for name, error in syncs.items() if error},
        "rows": [],
        "tiles": [],
    }
    checked: Checked = {}
    failed = len(content["host_waits"])
    for case in cases:
        rows = measure(case, device, roof, options.rounds, checked)
        show(rows)
        failed += sum(r.implementation == OURS and r.problem is not None for r in rows)
        content["rows"] += [row.to_json() for row in rows]
        save(path, content)
    for case in cases if device.type == "cuda" else []:
        if case.op == "trajectory" and case.fraction in (1.0, 0.1):
            content["tiles"] += measure_tiles(case, device, options.rounds)
            save(path, content)
    for record in content["tiles"]:
        print(
            f"{record['kernel']:8} {record['tiles']:16} "
            f"{record['problem'] or format(record['median_ms'], '.4f') + ' ms'}"
        )
    print(f"wrote {path}")
    if not options.skip_steps:
        training_steps(device)
    return 1 if failed else 0


def save(path: Path, content: dict[str, Any]) -> None:
    """Called after every case, so that results survive the loss of the machine."""
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
