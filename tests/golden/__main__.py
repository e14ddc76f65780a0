"""`python -m tests.golden DIR`: print every comparison with a reference directory; exit 1 when one fails."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.golden.check import run


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description="Does this engine compute what PiTe computes?"
    )
    parser.add_argument("directory", type=Path, nargs="?", default=Path(__file__).parent / "pite_reference")
    try:
        checks = []
        for check in run(parser.parse_args().directory):
            checks.append(check)
            print(f"{'ok  ' if check.passed else 'FAIL'} {check.error:8.1e}  {check.name}")
    except ValueError as error:
        print(f"tests.golden: {error}", file=sys.stderr)
        return 2
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks)} comparisons, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
