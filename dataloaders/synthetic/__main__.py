"""Make the synthetic world: `python -m dataloaders.synthetic OUT --videos 3400 --seed 0`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from dataloaders.cpu import available_cores
from dataloaders.synthetic.world import WorldConfig, make_world


def _show(part: str, done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"\r{part}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    defaults = WorldConfig()
    parser = argparse.ArgumentParser(prog="python -m dataloaders.synthetic", description=__doc__, allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make; the command can be repeated")
    parser.add_argument("--videos", type=int, default=defaults.videos, help="training videos (%(default)s)")
    parser.add_argument("--evaluation", type=int, default=defaults.evaluation, help="held-out videos (%(default)s)")
    parser.add_argument("--images", type=int, help="narrated stills of stage 1 (as many as --videos)")
    parser.add_argument(
        "--frames",
        type=int,
        default=defaults.frames,
        help="N frames for the indices in stage 3's answers (%(default)s)",
    )
    parser.add_argument("--size", type=int, default=defaults.size, help="width and height in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="random seed (%(default)s)")
    parser.add_argument("--processes", type=int, default=available_cores(), help="worker processes (%(default)s)")
    flags = parser.parse_args(arguments)
    images = flags.videos if flags.images is None else flags.images
    started = time.monotonic()
    try:
        config = WorldConfig(flags.videos, flags.evaluation, images, flags.frames, flags.size, flags.seed)
        made = make_world(flags.output, config, max(flags.processes, 1), _show)
    except (ValueError, OSError) as error:
        print(f"dataloaders.synthetic: {error}", file=sys.stderr)
        return 2
    print(f"{flags.output}: {f'made in {time.monotonic() - started:.0f} s' if made else 'already complete'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
