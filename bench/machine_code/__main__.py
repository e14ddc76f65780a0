"""`python -m bench.machine_code`: a table of what the Triton kernels compile to, over several Triton releases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders import cli
from dataloaders.files import write_atomically

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "triton"
NAMES = {80: "sm_80 (A100)", 90: "sm_90 (H100, H200)", 100: "sm_100 (B200)"}

ABOUT = """# Machine code of the Triton kernels

`python -m bench.machine_code` compiles every kernel in the specialisations that are launched, without a GPU.
[bench/machine_code/shapes.py](../machine_code/shapes.py) has the calls. A cell has: registers of a thread (and bytes of
spilled ones, if any), blocks that fit on a multiprocessor with their shared memory, and for a GEMM in half precision,
per K-step, the cycles in which the warps issue their instructions / the cycles of the tensor cores. Where the first is
the smaller number, the tensor cores are the limit. The blocks of several programs overlap, so this is a bound and not a
measurement. `LDG` marks K-steps with loads that are not asynchronous. The JSON file has the counts.
"""


@dataclass(frozen=True)
class Config:
    """What the Triton kernels compile to: registers, spills, shared memory, and the instructions of a K-step."""

    triton: tuple[str, ...] = ("3.6.0", "3.7.1", "3.9.0")
    """Releases of Triton. pip installs each into build/triton, next to the torch of this environment."""
    output: Path = Path("bench/results/machine_code")
    """The table and its numbers: this path with .md and .json."""


def install(version: str) -> Path:
    """The folder of a Triton release that comes first on the path of a process. Raises ValueError if pip fails."""
    folder = ENVIRONMENTS / version
    if not (folder / "triton").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise ValueError(f"--triton {version}: {last}")
    return folder


def measure(version: str) -> list[dict[str, Any]]:
    """The rows of one Triton release, in a process of their own."""
    path = os.pathsep.join(map(str, (install(version), ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-m", "bench.machine_code.rows"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"--triton {version}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    result = json.loads(done.stdout)
    if result["triton"] != version:
        raise ValueError(f"--triton {version}: the process imported Triton {result['triton']} instead")
    return [{"triton": version, **row} for row in result["rows"]]


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    spilled = f" (**{row['stack']} spilled**)" if row["stack"] else ""
    shared = f" of {row['shared'] / 1024:.0f} KB" if row["shared"] else ""
    plural = "s" * (row["blocks"] != 1)
    parts = [f"{row['registers']}{spilled}", f"{row['blocks']} block{plural}{shared}"]
    if "tensor_cycles" in row:
        late = " LDG" if row["other_loads"] >= 1 else ""
        parts.append(f"{row['instructions'] * row['warps'] / 4:.0f} / {row['tensor_cycles']:.0f}{late}")
    return ", ".join(parts)


def lines_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON with one row on each line."""
    return '{"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table per architecture: a line per kernel and call, a column per Triton release."""
    versions = sorted({row["triton"] for row in rows})
    lines = [ABOUT]
    for capability, name in NAMES.items():
        chosen = {(r["kernel"], r["call"], r["triton"]): r for r in rows if r["capability"] == capability}
        lines += [f"## {name}", "", "| kernel | call | " + " | ".join(f"Triton {v}" for v in versions) + " |"]
        lines.append("|" + "---|" * (2 + len(versions)))
        for kernel, call in sorted({key[:2] for key in chosen}):
            cells = [cell(chosen.get((kernel, call, version))) for version in versions]
            lines.append(f"| {kernel.removesuffix('_kernel')} | {call} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(Config, argv, "bench.machine_code")

    def command() -> None:
        rows = []
        for version in config.triton:
            rows += measure(version)
            print(f"Triton {version}: {len(rows)} programs compiled", file=sys.stderr, flush=True)
            config.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(config.output.with_suffix(".json"), lines_of(rows))
            write_atomically(config.output.with_suffix(".md"), markdown(rows))
        spilled = sum(bool(row["stack"]) for row in rows)
        print(f"{len(rows)} programs, {spilled} with spilled registers: {config.output.with_suffix('.md')}")

    return cli.run("bench.machine_code", command)


if __name__ == "__main__":
    sys.exit(main())
