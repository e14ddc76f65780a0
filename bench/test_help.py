"""Wall time of each command's --help, as a share of `import torch` in the same run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median

from tests import SOURCE_PATH
from tests.test_quick import COMMANDS

ROUNDS = 5
LARGEST_SHARE = 0.5


def seconds(*arguments: str) -> float:
    """Wall time of a Python process."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": SOURCE_PATH}
    subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def test_help_takes_less_than_half_of_importing_torch() -> None:
    runs = {"torch": ("-c", "import torch"), **{name: ("-m", name, "--help") for name in COMMANDS}}
    # In turn, so that other load on the machine meets all of them.
    rounds = [{name: seconds(*arguments) for name, arguments in runs.items()} for _ in range(ROUNDS + 1)][1:]
    times = {name: median(each[name] for each in rounds) for name in runs}
    shares = {name: times[name] / times["torch"] for name in COMMANDS}
    print(f"import torch {times['torch']:.2f} s; " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    assert max(shares.values()) < LARGEST_SHARE
