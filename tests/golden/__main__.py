"""`python -m tests.golden DIR`: print every comparison with a reference directory; exit 1 when one fails."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.golden import check, pg_check


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden",
        description="Does this engine compute what the published PiTe or PG-Video-LLaVA computes?",
    )
    parser.add_argument("directory", type=Path, nargs="?", default=Path(__file__).parent / "pite_reference")
    try:
        checks, directory = [], parser.parse_args().directory
        for each in (pg_check if pg_check.is_reference(directory) else check).run(directory):
            checks.append(each)
            print(f"{'ok  ' if each.passed else 'FAIL'} {each.error:8.1e}  {each.name}")
    except ValueError as error:
        print(f"tests.golden: {error}", file=sys.stderr)
        return 2
    failed = sum(not each.passed for each in checks)
    print(f"{len(checks)} comparisons, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
