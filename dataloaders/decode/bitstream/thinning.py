"""Which packets a decoder needs for the wanted frames.

Measured with PyAV on one core of 1,560 frames of which 100 are wanted: half of x264's and x265's packets are needed, 85%
of those of a stream without B-frames, 95% of VP9's (LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataloaders.decode.bitstream.picture import CLEAN, NOT
from dataloaders.decode.bitstream.pictures import Pictures


@dataclass(frozen=True)
class Needed:
    """The needed packets of a stream, in the order of decoding.

    kept   (P,) bool: the decoder needs this packet
    fresh  (P,) bool: packets before this one are missing to which later ones cannot refer: the decoder starts anew here
    """

    kept: np.ndarray
    fresh: np.ndarray


def needed(pictures: Pictures, wanted: np.ndarray, splice: bool = False) -> Needed:
    """The packets that show the `wanted` display times (n,), and those that they need.

    splice  the packets become one stream, whose decoder is not flushed at gaps: a gap ends only at a CLEAN picture
    """
    is_wanted = np.isin(pictures.ticks, wanted)
    starts = np.flatnonzero(pictures.restarts != NOT)
    ends = np.append(starts[1:], len(pictures.ticks))
    kept, fresh = np.zeros(len(is_wanted), bool), np.zeros(len(is_wanted), bool)
    any_before = np.flatnonzero(is_wanted)[:1]
    whole = False  # a later group refers to this one
    for start, end in zip(starts[::-1].tolist(), ends[::-1].tolist()):
        here = np.flatnonzero(is_wanted[start:end])
        if not len(here) and not whole:
            continue
        until = end if whole else start + int(here[-1]) + 1
        leads = bool((pictures.leading & is_wanted)[start:end].any())
        part = slice(start, until)
        kept[part] = is_wanted[part] | ~(pictures.spare[part] | (pictures.leading[part] & (not leads)))
        joins = splice and pictures.restarts[start] != CLEAN and bool((any_before < start).any())
        whole = leads or joins
        fresh[start] = not whole
    return Needed(kept, fresh)
