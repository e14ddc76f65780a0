"""Training speed on a CPU under load: `python -m bench.load --output bench/results/load_cpu.json`.

Times the demo's stage 1 (engine.train, the tiny model with random weights and features) alone and with busy loops on
the same cores, for each wait policy of OpenMP threads. The variants run in turn, so that other work affects all
equally.

  ours      what all our commands set: 1,000 spins, then sleep
  sleep     OMP_WAIT_POLICY=PASSIVE: no spins
  spin      libgomp's default: 300,000 spins, then sleep
  1 thread  no other thread to wait for
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import environment
from bench.report import fill
from dataloaders.cpu import WAIT_POLICY, available_cores
from dataloaders.files import write_atomically
from dataloaders.synthetic.features import write_random_features
from dataloaders.synthetic.world import WorldConfig, make_world
from engine.metrics import read_metrics

POLICIES = {
    "ours": WAIT_POLICY,
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}
MARK = "<!-- measured: python -m bench.load -->"
LEAST_SHARE = 0.25
"""The required fraction of the idle machine's tokens/s. Under load, half of the cores' time is available."""

_IMAGES, _FRAMES, _CHANNELS, _WARM_UPS = 640, 32, 64, 5
_BUSY = "while True: pass"


def make_data(root: Path) -> None:
    """Write ROOT/data, narrated images like the demo's, and ROOT/features, random features of them."""
    make_world(root / "data", WorldConfig(videos=1, evaluation=1, images=_IMAGES, frames=_FRAMES), processes=1)
    write_random_features(root / "data", root / "features", _FRAMES, _CHANNELS)


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Context with `count` processes that each keep one core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tokens_per_second(root: Path, policy: str, steps: int) -> float:
    """Median over the steps of one run of stage 1, without the warm-up steps."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    with tempfile.TemporaryDirectory(dir=root) as output:
        command = [
            *(sys.executable, "-m", "engine.train", "--stage", "1", "--model", "tiny", "--llm", "random"),
            *("--data", str(root / "data"), "--store", str(root / "features"), "--output", output, "--device", "cpu"),
            *("--global-batch", "64", "--epochs", "100", "--max-steps", str(_WARM_UPS + steps)),
            *("--checkpoint-every", "1000000"),
        ]
        subprocess.run(command, env=variables | POLICIES[policy], check=True, stderr=subprocess.DEVNULL)
        lines = read_metrics(Path(output) / "stage1" / "metrics.jsonl")
    return median(line["tokens_per_second"] for line in lines[_WARM_UPS:])


def measure(
    root: Path, rounds: int, steps: int, loops: int, policies: Sequence[str] = tuple(POLICIES)
) -> list[dict[str, Any]]:
    """A row for each policy: tokens/s alone and under load, median and range over the rounds, and their ratio."""
    found: dict[tuple[str, int], list[float]] = {(policy, n): [] for n in (0, loops) for policy in policies}
    for _ in range(rounds):
        for (policy, n), rates in found.items():
            with busy_loops(n):
                rates.append(tokens_per_second(root, policy, steps))
    rows = []
    for policy in policies:
        alone, loaded = found[policy, 0], found[policy, loops]
        rows.append(
            {
                "policy": policy,
                "alone": median(alone),
                "alone_range": [min(alone), max(alone)],
                "loaded": median(loaded),
                "loaded_range": [min(loaded), max(loaded)],
                "share": median(loaded) / median(alone),
            }
        )
    return rows


def table(content: dict[str, Any]) -> str:
    """The Markdown table of a result file."""
    about = content["environment"]
    lines = [
        f"| {about['device'].partition(',')[0]}, {about['cores']} cores, commit {about['commit']} | tokens/s alone | "
        f"with {about['busy loops']} busy loops | share |",
        "|---|---|---|---|",
    ]
    for row in content["rows"]:
        spans = [
            f"{row[n]:,.0f} ({row[f'{n}_range'][0]:,.0f} to {row[f'{n}_range'][1]:,.0f})" for n in ("alone", "loaded")
        ]
        lines.append(f"| {row['policy']} | {spans[0]} | {spans[1]} | {row['share']:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if under load less than a quarter of the speed is left with our policy."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a run (%(default)s)")
    parser.add_argument("--loops", type=int, default=2, help="busy loops (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--page", type=Path, help="Markdown file whose table is replaced")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        rows = measure(Path(folder), flags.rounds, flags.steps, flags.loops)
    about = environment(torch.device("cpu")) | {"cores": available_cores(), "busy loops": flags.loops}
    content = {"environment": about, "rows": rows}
    print(table(content))
    if flags.output is not None:
        write_atomically(flags.output, json.dumps(content, indent=1) + "\n")
    if flags.page is not None:
        write_atomically(flags.page, fill(flags.page.read_text(), table(content), MARK))
    slow = rows[0]["share"] < LEAST_SHARE
    if slow:
        print(
            f"bench.load: under load {rows[0]['share']:.0%} of the speed is left, less than {LEAST_SHARE:.0%}",
            file=sys.stderr,
        )
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
