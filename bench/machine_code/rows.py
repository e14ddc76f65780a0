"""Prints what every program compiles to with the installed Triton, as JSON; `python -m bench.machine_code` runs it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import triton

from bench.machine_code.programs import FMA_PER_CYCLE, fma_per_step, measure, tensor_share
from bench.machine_code.shapes import all_launches, is_float8


def main() -> None:
    rows = []
    programs = Counter[tuple[str, str]]()  # of one kernel that one call launches
    for launch, call in all_launches().items():
        programs[launch.name, call] += 1
        if (number := programs[launch.name, call]) > 1:
            call = f"{call} ({number})"
        for capability, fma in FMA_PER_CYCLE.items():
            if capability < 89 and is_float8(launch):
                continue
            program = measure(launch, capability)
            share = tensor_share(launch, program)
            cycles = {"tensor_cycles": fma_per_step(launch) / fma, "tensor_share": share} if share else {}
            rows.append({"kernel": launch.name, "call": call, **asdict(program), **cycles})
    print(json.dumps({"triton": triton.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
