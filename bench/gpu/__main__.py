"""`python -m bench.gpu --results DIR --budget SECONDS`: a session on a GPU, in sections in order of value.

Each section writes what it has measured into DIR at once. A section that does not fit into the rest of the budget is left
out, and `python -m bench.report DIR` lists it as not run. The same command with the same DIR goes on with what is missing.
docs/gpu.md has the plan of a session.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.plan import ENVIRONMENT, PRELOAD, SECTIONS
from bench.gpu.results import SESSION
from bench.gpu.session import Options, run_session
from dataloaders.files import read_json_object


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    # Fork-safe: torch.cuda.is_available() does not start CUDA in the process from which the sections are forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--budget", type=_seconds, default=600, metavar="SECONDS", help="length of the session (600)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cuda, or cpu to try the script on tiny shapes"
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="SECTION", help=f"of {', '.join(names)}; done ones run again"
    )
    parser.add_argument("--commit", help="commit of the source, where it is a copy without git")
    options = parser.parse_args(arguments)
    done = done_before(options.results)
    chosen = [s for s in SECTIONS if (s.name in options.only if options.only else s.name not in done)]
    where = Options(options.results, options.budget, options.device, begin, options.commit)
    try:
        failed = run_session(chosen, where, ENVIRONMENT, PRELOAD)
    except (ValueError, OSError) as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.results}: python -m bench.report {options.results}")
    return 1 if failed else 0


def done_before(results: Path) -> list[str]:
    """Names of the sections that an earlier call has done."""
    path = results / SESSION
    sections = read_json_object(path)["sections"] if path.exists() else {}
    return [name for name, section in sections.items() if section["state"] == "done"]


if __name__ == "__main__":
    sys.exit(main())
