"""python -m engine.encode --data DIR --store DIR: encodes every video and image of a data folder with CLIP, once.

Worker processes decode and crop frames while CLIP encodes earlier ones. Every forward pass has the same shape: a short
batch is padded with black frames. A feature therefore does not depend on the other files of its batch, and a run that
was killed and resumed stores the same bytes as an uninterrupted one.

Under torchrun each process takes an equal share of the files, measured by length, and writes its own shards. The
processes share the folder, its lists of media and its failure log. One process reads the annotations, where no earlier
run has; after that they never wait for one another, so there is no process group.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataloaders import logs
from dataloaders.cli import parse, print_once
from dataloaders.errors import sentence
from dataloaders.ranks import Ranks
from engine.distributed.errors import print_error
from engine.encode.config import EncodeConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error."""
    config = parse(EncodeConfig, argv, prog="python -m engine.encode")
    logs.configure(config.log_level)
    try:
        config.check_paths()
    except (ValueError, OSError) as error:
        print_once("engine.encode", sentence(error))
        return 1
    # Imported after the flags and paths are checked: it takes seconds.
    from engine.encode.run import run

    try:
        run(config, Ranks.read())
    except (ValueError, OSError) as error:
        print_error("engine.encode", sentence(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
