"""Questions about videos: `python -m pite.chat --model DIR --video V [--query Q] [--trajectory overlay.mp4]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataloaders import logs
from dataloaders.cli import parse, run
from pite.chat.flags import ChatFlags


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse(ChatFlags, argv, prog="python -m pite.chat")
    logs.configure(flags.log_level)

    def chat() -> int:
        flags.check_paths()
        # Imported after the flags and paths are checked: it takes seconds.
        from pite.chat.commands import chat

        return chat(flags)

    return run("pite.chat", chat)


if __name__ == "__main__":
    sys.exit(main())
