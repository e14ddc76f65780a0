"""Whether a clip is to be cut from a file, or the file is the clip.

Records name clips by their times in a source. Some users store the sources, others the clips that they cut before, under
the same names. A clip that was cut before ends, by its record, long after its file does, and the file lasts as long as it.
"""

from __future__ import annotations

from pathlib import Path

from dataloaders.decode.readable import DecodeError
from dataloaders.formats.fields import durations_differ

CLIP_TOLERANCE = 1.0
"""Seconds by which a clip may end after its file: lengths are rounded, and audio is often longer than the pictures."""

_EXACT = 0.1
"""Seconds by which times differ that mean the same moment."""

_SHARE = 0.01
"""Share of a clip, one frame of 100, by which it may be shifted."""

Clip = tuple[float, float] | None


def clip_in(path: Path, clip: Clip, ends: tuple[float, float], last: float) -> Clip:
    """The clip to cut from a file; None if that is the file itself.

    ends  seconds at which the pictures and the whole file end; the sound of either is often longer
    last  seconds at which the last frame is first shown, for the message
    Raises DecodeError for a file that is neither the clip nor long enough for it, and for one that may be either.
    """
    if clip is None:
        return None
    start, end = clip
    length, beyond = end - start, end - ends[1]
    # From the beginning of the file both are the same.
    if beyond <= _EXACT or (start <= max(_EXACT, _SHARE * length) and beyond <= CLIP_TOLERANCE):
        return clip
    lasts = min(ends, key=lambda seconds: abs(seconds - length))
    if not durations_differ(lasts, length):
        if start >= ends[1] or abs(lasts - length) <= _EXACT:
            return None
        raise DecodeError(
            f"{path}: lasts {lasts:.2f} s, so it may be the clip from {start:g} to {end:g} s or the start of its source; write"
            " null in place of the record's times if it is the clip, else put the whole source here"
        )
    if beyond > CLIP_TOLERANCE:
        raise DecodeError(f"{path}: its last frame is at {last:.2f} s, before the clip's end at {end:g} s")
    return clip
