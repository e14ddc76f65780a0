"""Decoding only the needed packets against all of them, on one core: 100 frames of 1,500, resized and cropped.

The two are measured in turn, in CPU time of this process, and their medians are compared. x264 and x265 with their default
groups of pictures need half of their packets.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from bench.frames import share_kept
from bench.measure import environment
from bench.media import write_video
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.video import sample_video

N, FRAMES, ROUNDS = 100, 1500, 7
LEAST = {("H.264", "360p"): 1.2, ("HEVC", "360p"): 1.3, ("H.264", "720p"): 1.2}
"""Kind of file -> the least ratio of the two rates."""


def decode(path: Path, thinned: bool) -> tuple[float, np.ndarray]:
    """CPU seconds and frames (N, S, S, 3) of one decode."""
    begin = time.process_time()
    frames = sample_video(path, N, transform=Preprocess().cropped, thinned=thinned).frames
    return time.process_time() - begin, np.stack(frames)


@pytest.mark.parametrize(("kind", "least"), LEAST.items(), ids=["-".join(kind) for kind in LEAST])
def test_needed_packets_alone(benchmark: Any, tmp_path: Path, kind: tuple[str, str], least: float) -> None:
    path = write_video(tmp_path / "-".join(kind), *kind, frames=FRAMES)
    np.testing.assert_array_equal(decode(path, True)[1], decode(path, False)[1])
    seconds: dict[bool, list[float]] = {True: [], False: []}

    def both() -> None:
        for thinned in (True, False):
            seconds[thinned].append(decode(path, thinned)[0])

    benchmark.pedantic(both, rounds=ROUNDS)
    rates = {thinned: FRAMES / median(spent) for thinned, spent in seconds.items()}
    ratios = sorted(whole / needed for needed, whole in zip(seconds[True], seconds[False]))
    share, ratio = share_kept(path, N), rates[True] / rates[False]
    benchmark.extra_info.update(environment(torch.device("cpu")), rates=rates, ratio=ratio, ratios=ratios, share=share)
    print(
        f"\n{'-'.join(kind):12} {share:.0%} of the packets: {rates[False]:,.0f} -> {rates[True]:,.0f} frames/s,"
        f" x{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    assert ratio >= least
