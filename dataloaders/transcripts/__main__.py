"""Write transcripts of videos' sound.

python -m dataloaders.transcripts --videos VIDEOS --output TRANSCRIPTS --model whisper-base
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataloaders import cli, logs
from dataloaders.transcripts.flags import TranscriptFlags


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = cli.parse(TranscriptFlags, argv, prog="python -m dataloaders.transcripts")
    logs.configure(flags.log_level)

    def transcribe() -> None:
        flags.check_paths()
        # Imported after the flags and paths are checked, because it imports the decoder.
        from dataloaders.transcripts.run import run

        run(flags)

    return cli.run("dataloaders.transcripts", transcribe)


if __name__ == "__main__":
    sys.exit(main())
