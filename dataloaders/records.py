"""The types that all readers return: media to encode, and samples to train on.

A sample refers to its media by key and holds no pixels. Frames are decoded and encoded once, by engine.encode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

VideoFirst = Literal["published", "always"]
"""Which samples have the video before the question: those of odd records, counted from 0 in the unfiltered file, as
published; or all, so that questions about one video share its rows."""

ABSENT = -1.0
"""Value of both coordinates of a point that is not in the frame (PiTe section 4.2)."""


class RecordError(ValueError):
    """A malformed record: the message starts with file, line and field."""


@dataclass(frozen=True)
class Media:
    """One item to encode: a video, a clip of a video, or a still image.

    key    unique name of its feature record
    path   file to decode
    kind   "video" (N frames) or "image" (one frame)
    clip   (start, end) in seconds of the clip inside the file; None for the whole file
    duration  seconds that the file or clip lasts by its annotation, where that gives them; not compared
    """

    key: str
    path: Path
    kind: Literal["video", "image"] = "video"
    clip: tuple[float, float] | None = None
    duration: float | None = field(default=None, compare=False)


def clash(known: Media, other: Media) -> str:
    """Why `other` cannot have the key of `known`, an earlier record's media: it is another file or clip."""
    return (
        f"{other.key!r} is {_described(other)}, but {_described(known)} in an earlier record; give each file or clip an id "
        "of its own"
    )


def _described(media: Media) -> str:
    return (
        f"{media.path.name} from {media.clip[0]:g} to {media.clip[1]:g} s"
        if media.clip
        else f"all of {media.path.name}"
    )


@dataclass(frozen=True)
class Mention:
    """A noun phrase of an answer, and the trajectory of its object.

    start, end  character span in the answer, end exclusive
    trajectory  (P, N, 2) float32, x and y in [0, 1] from the top left; (-1, -1) where absent
    """

    start: int
    end: int
    trajectory: np.ndarray


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as plain text: no `<video>`, no marks, no `</s>`."""

    question: str
    answer: str
    mentions: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One training example: a conversation about one piece of media.

    video_first  whether the video comes before the first question; only layouts with both orders use it
    transcript   of the video's sound, for layouts that quote one; None: none is quoted
    """

    id: str
    media: str
    turns: tuple[Turn, ...]
    video_first: bool = True
    transcript: str | None = None


@dataclass(frozen=True)
class TokenizedSample:
    """A sample ready for the packed batch. Positions count from 0 within the sample.

    token_ids             (n,) int64, 0 at the features
    frame_start           position of the first feature; they fill frame_start .. frame_start + num_features
    num_features          rows of the media's record: one for each frame, or what the extractor of another family gives
    target_positions      (L,) int64, positions of supervised tokens (each predicted by the row before it)
    trajectory_positions  (M,) int64, supervised positions whose token has a trajectory
    trajectory            (M, P, N, 2) float32
    """

    id: str
    media: str
    token_ids: np.ndarray
    frame_start: int
    num_features: int
    target_positions: np.ndarray
    trajectory_positions: np.ndarray
    trajectory: np.ndarray

    @property
    def num_coordinates(self) -> int:
        """Number of present coordinates, two per present point: this sample's part of the L1 normalizer."""
        return int((self.trajectory != ABSENT).all(-1).sum()) * 2
