"""What decoding finds out about a file, for the counts and checks of the run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What is reported of a file besides its frames.

    uneven      frames sampled by index and by time differ by more than a frame's share
    ends        seconds at which the pictures and the whole file end, by its packets; empty where unknown
    cut_before  the file is the clip that was to be cut from it, and was used whole
    """

    uneven: bool = False
    ends: tuple[float, ...] = ()
    cut_before: bool = False
