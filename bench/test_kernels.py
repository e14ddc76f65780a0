"""The kernel benchmarks for a CPU: `pytest bench/`, under three minutes. For a GPU use `python -m bench.gpu`."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.kernels.cases import IMPLEMENTATIONS, OURS, PLAIN
from bench.kernels.inputs import Case, Inputs, cpu_cases
from bench.kernels.rows import find_problem
from bench.measure import Roofline, cpu_clock, environment, interleaved, roofline
from pite_kernels import dispatch

CPU = torch.device("cpu")
PAIRS = [(case, name) for case in cpu_cases() for name in IMPLEMENTATIONS[case.op]]


@lru_cache
def roof() -> Roofline:
    return roofline(CPU, torch.float32)


@pytest.mark.benchmark(timer=cpu_clock())
@pytest.mark.parametrize(("case", "implementation"), PAIRS, ids=[f"{c.name} [{n}]" for c, n in PAIRS])
def test_speed(benchmark: Any, case: Case, implementation: str) -> None:
    problem = find_problem(case, implementation, CPU)
    if problem is not None and problem.startswith("not available"):
        pytest.skip(problem)
    assert problem is None, "wrong results are not timed"
    step = IMPLEMENTATIONS[case.op][implementation](Inputs(case, CPU))
    benchmark.group = case.name
    benchmark.extra_info.update(environment(CPU), implementation=implementation, op=case.op, fraction=case.fraction)
    benchmark.extra_info.update({k: str(v) for k, v in asdict(roof()).items()})
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
    benchmark.extra_info["roofline_share"] = roof().floor(*case.work) / benchmark.stats.stats.median


@pytest.mark.parametrize(("fraction", "speedup"), [(0.1, 3.0), (1.0, 1.0)])
def test_cpp_trajectory_head_against_eager(fraction: float, speedup: float) -> None:
    """At least three times as fast as eager at 10% of the rows, and not slower when every row has a trajectory."""
    if dispatch._library() is None:
        pytest.skip("the C++ operators are not built")
    case = Case("trajectory", 1024, 512, fraction, dtype=torch.float32)
    assert find_problem(case, OURS, CPU) is None
    inputs = Inputs(case, CPU)
    steps = {name: IMPLEMENTATIONS["trajectory"][name](inputs) for name in (OURS, PLAIN)}
    timings = interleaved(steps, CPU, rounds=30)
    ours, eager = timings[OURS], timings[PLAIN]
    print(
        f"{fraction:.0%} of the rows: {eager.median / ours.median:.2f} times eager; ms, median (10% to 90%):", end=" "
    )
    print(*(f"{t.median * 1e3:.2f} ({t.low * 1e3:.2f} to {t.high * 1e3:.2f})" for t in (ours, eager)), sep=", eager ")
    # The fastest rounds, because other work on the machine can only add time.
    assert eager.low / ours.low >= speedup
