"""How well annotation follows things: `python -m bench.annotation --clip vtest.avi`.

  walkers    54 people of a real video, from their labelled first box (not a mask) over 8 s, with a label every 0.5 s;
             40 are for tuning, 14 are held out. Detection plays no part.
               kept     walkers with a trajectory: key points that are present in at least 30% of the moments
               inside   key points at moments (after the first) in which the walker is visible: share of those that
                        are present and inside the labelled box; a walker without a trajectory counts with 0
               absent   key points at moments in which a kept walker is out of the picture: share that is absent
  synthetic  80 videos of the synthetic world with exact masks: error of the points of tracks (median, mean, in
             fractions of the frame), and the share of visible points kept; by Lucas-Kanade alone, and as annotation does

The video is in Debian's package opencv-doc. Without --clip only the synthetic world is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.annotation.labels import HALVES, check_clip, read_walkers
from bench.annotation.synthetic import agreement, track_world
from bench.annotation.walkers import METHODS, OF_PEOPLE, measure, total
from bench.measure import environment
from dataloaders.files import write_atomically

VIDEOS = 80


def _walkers(clip: Path, halves: Sequence[str], method: str) -> dict[str, dict[str, float]]:
    found = {}
    for half in halves:
        walkers = [walker for walker in read_walkers() if walker.half == half]
        started = time.process_time()
        outcomes = measure(clip, walkers, METHODS[method])
        seconds = time.process_time() - started
        for walker, outcome in zip(walkers, outcomes):
            print(f"  {walker.number:2} {outcome.marks}")
        found[half] = total(outcomes) | {"walkers": len(walkers), "cpu_ms_per_frame": 1e3 * seconds / 81 / len(walkers)}
        print(f"{method}, {half}: " + ", ".join(f"{name} {value:.3g}" for name, value in found[half].items()))
    return found


def _synthetic(method: str) -> dict[str, float]:
    seen = agreement(track_world(VIDEOS, METHODS[method]))
    row = {
        "median_error": float(np.median(seen.errors)),
        "mean_error": float(seen.errors.mean()),
        "kept": float(seen.kept),
        "hidden": float(seen.wrong),
    }
    print(f"{method}, synthetic: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.annotation", description=__doc__.partition("\n")[0])
    parser.add_argument("--clip", type=Path, help="vtest.avi of Debian's opencv-doc")
    parser.add_argument("--half", choices=HALVES, help="only this half of the walkers; both unless given")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=["annotation"], help="what to measure")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    flags = parser.parse_args(argv)
    result: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    if flags.clip is not None:
        try:
            check_clip(flags.clip)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    for method in flags.method:
        result[method] = {"synthetic": _synthetic(method)} if method not in OF_PEOPLE else {}
        if flags.clip is not None:
            result[method] |= _walkers(flags.clip, [flags.half] if flags.half else HALVES, method)
    if flags.output is not None:
        write_atomically(flags.output, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
