"""A web page to try a model: `python -m pite.web [--model DIR --clip CLIP]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataloaders import logs
from dataloaders.cli import parse, run
from pite.web.flags import WebFlags


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse(WebFlags, argv, prog="python -m pite.web")
    logs.configure(flags.log_level)

    def web() -> None:
        flags.check_paths()
        # Imported after the flags and paths are checked: it takes seconds.
        try:
            from pite.web.server import run_server
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise ValueError("the page needs Gradio: pip install 'pite-engine[web]'") from None

        run_server(flags)

    return run("pite.web", web)


if __name__ == "__main__":
    sys.exit(main())
