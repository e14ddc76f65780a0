"""Make PiTe-143k records from videos and their event captions.

python -m dataloaders.annotation --captions train.json --videos DATA/stage2/videos --output DATA/stage2/pite_143k.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataloaders import cli, logs
from dataloaders.annotation.flags import AnnotationFlags


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = cli.parse(AnnotationFlags, argv, prog="python -m dataloaders.annotation")
    logs.configure(flags.log_level)

    def annotate() -> None:
        flags.check_paths()
        # Imported after the flags and paths are checked, because it imports the decoder.
        from dataloaders.annotation.run import run

        run(flags)

    return cli.run("dataloaders.annotation", annotate)


if __name__ == "__main__":
    sys.exit(main())
