"""Trains the demo's two initial models: `python -m engine.tiny OUT` writes OUT/clip and OUT/vicuna in HF format."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from engine.tiny.models import TinyConfig, make_tiny


def main(arguments: list[str] | None = None) -> int:
    defaults = TinyConfig()
    parser = argparse.ArgumentParser(prog="python -m engine.tiny", description=__doc__, allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="OUT", help="output folder; models that it already holds are kept")
    parser.add_argument("--clip-steps", type=int, default=defaults.clip_steps, help="steps of 128 stills (%(default)s)")
    parser.add_argument(
        "--list-steps", type=int, default=defaults.list_steps, help="steps of 32 dialogues, mostly lists (%(default)s)"
    )
    parser.add_argument(
        "--vicuna-steps", type=int, default=defaults.vicuna_steps, help="further steps of 32 dialogues (%(default)s)"
    )
    parser.add_argument("--frames", type=int, default=defaults.frames, help="frames of a video (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of weights and data (%(default)s)")
    flags = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        config = TinyConfig(flags.clip_steps, flags.list_steps, flags.vicuna_steps, flags.frames, flags.seed)
        lines = make_tiny(flags.output, config)
    except (ValueError, OSError) as error:
        print(f"engine.tiny: {error}", file=sys.stderr)
        return 2
    for line in lines:
        print(line)
    print(f"{flags.output}: {f'made in {time.monotonic() - started:.0f} s' if lines else 'already complete'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
