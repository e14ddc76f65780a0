"""The functions of a session's sections, with all that they import; `bench.gpu.plan` lists them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.gpu.results import NotRun, Output
from bench.gpu.smoke import CHECKS, Shapes, result
from bench.gpu.trace import profile_step
from bench.kernels.cases import BARE, OURS
from bench.kernels.inputs import Case, cpu_cases, gpu_cases
from bench.kernels.rows import Checked
from bench.kernels.rows import describe as describe_kernels
from bench.kernels.rows import measure as measure_kernels
from bench.kernels.tiles import measure_tiles
from bench.measure import environment, gpu_details, roofline
from bench.step import implementations as steps
from bench.step.loop import find_loop_sync
from bench.step.problem import RECIPE, Problem, Shape, make_problem, make_workload, paper_shape, tiny_shape
from bench.step.rows import describe, measure_alone
from engine.distributed.world import grow_segments
from engine.layout import count_parameters

TESTS = Path(__file__).parents[2] / "tests" / "kernels"
CHECK_FILES = ("triton_checks.py", "triton_lora_checks.py", "rope_checks.py")


def open_device(name: str) -> torch.device:
    """The device, with the allocator as in engine.train."""
    grow_segments()
    return torch.device(name)


def shape_on(device: torch.device, size: str) -> tuple[str, Shape]:
    """A model's name and shape; on a CPU a tiny one with few samples."""
    return (size, paper_shape(size)) if device.type == "cuda" else ("tiny", replace(tiny_shape(), samples=4))


def capacity(device: torch.device, shape: Shape) -> float | None:
    """Bytes for the layout: the whole device, but for the model's own LoRA, of which each implementation has a copy."""
    if device.type != "cuda":
        return None
    count = count_parameters(shape.config, RECIPE)
    return torch.cuda.get_device_properties(device).total_memory - 4.0 * (count.lora + count.heads)


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def problem_on(device: torch.device, size: str) -> tuple[str, Problem]:
    """Raises NotRun if the model does not fit."""
    name, shape = shape_on(device, size)
    rank = RECIPE.lora_rank if device.type == "cuda" else 16
    try:
        return name, make_problem(shape, device, dtype_on(device), rank, None, capacity(device, shape))
    except ValueError as error:
        raise NotRun(str(error)) from error


# -- sections ------------------------------------------------------------------------------------------------------


def describe_device(device_name: str, output: Output) -> None:
    """The environment, after an operation on the device."""
    device = open_device(device_name)
    assert torch.ones(2, device=device).sum().item() == 2
    output.update(environment=environment(device) | gpu_details(device))


def smoke(device_name: str, output: Output) -> None:
    device = open_device(device_name)
    _, shape = shape_on(device, "7b")
    dtype = dtype_on(device)
    shapes = Shapes(shape, make_workload(shape, dtype.itemsize, capacity(device, shape)), device, dtype)
    output.update(tokens=shapes.batch.num_rows)
    for name in CHECKS:
        record = result(name, shapes)
        output.add([record], "checks")
        problem = record["wrong"] or (f"synchronizes: {record['synchronizes']}" if record["synchronizes"] else None)
        output.count_red(problem is not None)
        print(f"  {name:24} {problem or 'right'}")


def train_steps(device_name: str, output: Output, size: str, names: Sequence[str], rounds: int) -> None:
    """Rows of implementations, each alone on the device."""
    add_steps(output, *problem_on(open_device(device_name), size), names, rounds)


def add_steps(output: Output, model: str, problem: Problem, names: Sequence[str], rounds: int) -> None:
    output.update(samples=len(problem.samples), tokens=problem.tokens, computed_rows=problem.rows)
    for row in measure_alone(model, problem, rounds if problem.model.device.type == "cuda" else 1, names):
        output.add([vars(row)])
        print(describe(row))


def step_7b(device_name: str, output: Output) -> None:
    """Ours alone on the device; before fp8 replaces the weights, a step of the loop with synchronization forbidden."""
    device = open_device(device_name)
    model, problem = problem_on(device, "7b")
    add_steps(output, model, problem, (steps.LOOP, steps.OURS, steps.UNSHARED), 5)
    if device.type == "cuda":
        found = find_loop_sync(problem, 1)
        output.update(synchronizes=found or "nothing")
        output.count_red(found is not None)
    add_steps(output, model, problem, (steps.FP8,), 5)


def trace_7b(device_name: str, output: Output) -> None:
    device = open_device(device_name)
    _, problem = problem_on(device, "7b")
    step = steps.pite_step(problem)
    step()  # allocates the optimizer's moments
    trace = output.path.with_name("trace_7b.trace.json.gz")
    output.update(trace=trace.name, **profile_step(step, device, trace))


def kernel_cases(device: torch.device, every: bool) -> list[Case]:
    """The real shapes on a GPU. On a CPU small ones; `every`: all rows fractions, else one case of each operation."""
    if device.type == "cuda":
        return gpu_cases()
    cases = cpu_cases()
    return cases if every else [next(c for c in cases if c.op == op) for op in dict.fromkeys(c.op for c in cases)]


def time_kernels(device_name: str, output: Output, names: Sequence[str] | None, rounds: int) -> None:
    """Rows of kernel cases; names: implementations, None for all."""
    device = open_device(device_name)
    cases = kernel_cases(device, every=names is not None)
    roof = roofline(device, cases[0].dtype)
    output.update(roofline={"tflops": roof.flops / 1e12, "gbps": roof.bandwidth / 1e9})
    checked: Checked = {}
    for case in cases:
        rows = measure_kernels(case, device, roof, rounds if device.type == "cuda" else 2, checked, names)
        output.add(row.to_json() for row in rows)
        output.count_red(sum(row.implementation == OURS and row.problem is not None for row in rows))
        print(describe_kernels(rows))


def kernels(device_name: str, output: Output) -> None:
    time_kernels(device_name, output, (OURS, BARE), 20)


def peers_7b(device_name: str, output: Output) -> None:
    train_steps(device_name, output, "7b", (steps.PACKED, steps.PADDED, steps.KEPT), 3)


def step_13b(device_name: str, output: Output) -> None:
    train_steps(device_name, output, "13b", (steps.LOOP, steps.OURS, steps.FP8), 3)


def compiled_7b(device_name: str, output: Output) -> None:
    train_steps(device_name, output, "7b", (steps.COMPILED,), 5)


def tiles(device_name: str, output: Output) -> None:
    device = open_device(device_name)
    if device.type != "cuda":
        raise NotRun("tile sizes are those of a GPU")
    for case in gpu_cases():
        if case.op == "trajectory" and case.fraction in (1.0, 0.1):
            output.add(measure_tiles(case, device, 20))


def kernel_peers(device_name: str, output: Output) -> None:
    time_kernels(device_name, output, None, 20)


def triton_tests(device_name: str, output: Output) -> None:
    """The Triton tests on the device; on a CPU those of the rotary embedding, in Triton's interpreter."""
    if find_spec("pytest") is None:
        raise NotRun("pytest is not installed")
    cuda = device_name.startswith("cuda")
    variables = os.environ | ({} if cuda else {"TRITON_INTERPRET": "1"})
    options = ["-q", "-x", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider"]
    # After an illegal address all later tests of a process fail, so that -x shows the first.
    options += ["-n", "8"] if cuda and find_spec("xdist") else ["-p", "no:xdist"]
    files = [str(TESTS / name) for name in (CHECK_FILES if cuda else CHECK_FILES[-1:])]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=TESTS.parents[1], check=False)
    lines = done.stdout.splitlines()
    output.update(passed=done.returncode == 0, summary=lines[-1] if lines else done.stderr[-500:])
    if done.returncode:
        output.count_red(1)
        output.update(log=done.stdout[-8000:] + done.stderr[-2000:])


def unsloth_7b(device_name: str, output: Output) -> None:
    if find_spec("unsloth") is None:
        raise NotRun("unsloth is not installed")
    train_steps(device_name, output, "7b", (steps.UNSLOTH,), 3)
