"""An answer and a video to objects over time: noun phrases, tags, detections, identities, matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.annotation.appearance import object_pixels
from dataloaders.annotation.boxes import filled
from dataloaders.annotation.steps import Phrase, encode_mask
from dataloaders.annotation.tracking import Check, count_frames, frames_until, go_on, opencv
from dataloaders.annotation.video_masks import VideoTracker
from dataloaders.decode.video import probe
from pite.ground.carrying import carry
from pite.ground.matching import assign, match_words, mentions, names_picture
from pite.ground.objects import Detection, Detector, Object, join, same_things

Parser = Callable[[str], list[Phrase]]
_ROUNDING = 1e-6
"""Seconds by which the time of a frame may be rounded."""


@dataclass(frozen=True, eq=False)
class Grounded:
    """A text and the objects of its phrases in a video.

    size     width and height of the frames
    times    (n,) seconds at which each frame of the file is shown; ten frames a second for a file without times
    span     first frame looked at, and the frame after the last
    phrases  the noun phrases, each with the numbers of its objects
    objects  all objects that a phrase has, with their masks in the frames of their detections
    """

    text: str
    size: tuple[int, int]
    times: np.ndarray
    span: tuple[int, int]
    phrases: tuple[tuple[Phrase, tuple[int, ...]], ...]
    objects: tuple[Object, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: boxes in pixels, right and bottom edges outside; masks in COCO's uncompressed run lengths.

        `fps` is the mean, and `times` are those of the frames in `frames`, the first and the one after the last.
        """
        return {
            "answer": self.text,
            "size": list(self.size),
            "fps": round(_rate(self.times), 3),
            "frames": list(self.span),
            "times": np.round(self.times[slice(*self.span)], 3).tolist(),
            "phrases": [{"phrase": p.text, "start": p.start, "objects": list(o)} for p, o in self.phrases],
            "objects": [
                {
                    "tag": each.tag,
                    "score": round(each.score, 3),
                    "boxes": {str(frame): np.round(box, 1).tolist() for frame, box in each.boxes().items()},
                    "masks": {str(f): d.mask for f, d in each.found.items() if d.mask is not None},
                }
                for each in self.objects
            ],
        }


@dataclass(frozen=True, eq=False)
class Footage:
    """A video's file: the size of its frames (width, height), the seconds at which each is shown (n,), and at which the last
    one ends."""

    path: Path
    size: tuple[int, int]
    times: np.ndarray
    end: float

    @staticmethod
    def of(path: Path) -> Footage:
        """Read a file; one without times has 10 frames per second. Raises DecodeError."""
        found = probe(path)
        total = found.total if found.regular else count_frames(path)[1]
        known = len(found.packets.times) == total
        times, end = (found.packets.times, found.packets.end) if known else (np.arange(total) / 10.0, total / 10.0)
        _, frame = next(frames_until(path, {0}))
        return Footage(path, (frame.shape[1], frame.shape[0]), times, end)

    def between(self, seconds: tuple[float, float] | None) -> tuple[int, int]:
        """The first frame between two times, and the frame after the last; all frames without times.

        Raises ValueError where no frame is between them.
        """
        if seconds is None:
            return 0, len(self.times)
        first, end = np.searchsorted(self.times, np.array(seconds) - _ROUNDING)
        if first == end:
            raise ValueError(
                f"{self.path}: no frame is between {seconds[0]:g} and {seconds[1]:g} s; the first is at "
                f"{self.times[0]:.2f} s, the last at {self.times[-1]:.2f} s"
            )
        return int(first), int(end)

    def seconds(self, span: tuple[int, int]) -> tuple[float, float]:
        """The times between which the frames of a span are shown: the inverse of `between`."""
        end = self.times[span[1]] - _ROUNDING if span[1] < len(self.times) else self.end
        return max(float(self.times[span[0]]) - _ROUNDING, 0.0), float(end)


@dataclass(frozen=True)
class Grounder:
    """Grounds texts in videos. It keeps nothing of a video, so the order of the videos changes nothing.

    parser    sentence -> its noun phrases
    detector  finds things
    every     seconds between two frames in which things are looked for
    tracker   carries what was found through these frames; None: detections are joined by their boxes
    """

    parser: Parser
    detector: Detector
    every: float = 0.4
    tracker: VideoTracker | None = None

    def __call__(
        self, video: Path, text: str, seconds: tuple[float, float] | None = None, check: Check = go_on
    ) -> Grounded:
        """Ground a text in a video, or in the part between two times, with a mask for each detection.

        Raises DecodeError, and ValueError where no frame is between the times.
        """
        footage = Footage.of(video)
        found = self.find(footage, text, footage.between(seconds), check)
        return replace(found, objects=tuple(_masked(video, found.objects, check)))

    def find(self, footage: Footage, text: str, span: tuple[int, int], check: Check = go_on) -> Grounded:
        """Ground a text in the frames of `span`, with the masks that the detector gives. Raises DecodeError."""
        phrases = [phrase for phrase in self.parser(text) if not names_picture(phrase)]
        things = mentions(phrases)
        names = [thing[0].text for thing in things]
        matched = match_words(names, tags := self.detector.tags(names))
        wanted = [tag for tag in tags if tag in matched]
        looked_at = frames_every(footage.times, span, self.every)
        frames = frames_until(footage.path, looked_at if wanted else set(), check)
        found = join((index, self.detector(frame, wanted)) for index, frame in frames)
        found, places = self._assigned(footage.path, names, matched, found, sorted(looked_at), check)
        shown = list(dict.fromkeys(place for own in places for place in own))
        of_phrase: dict[Phrase, list[int]] = {phrase: [] for phrase in phrases}
        for thing, own in zip(things, places):
            for phrase in thing:
                of_phrase[phrase] += [shown.index(place) for place in own]
        objects = tuple(found[place] for place in shown)
        return Grounded(
            text, footage.size, footage.times, span, tuple((p, tuple(of_phrase[p])) for p in phrases), objects
        )

    def _assigned(
        self,
        video: Path,
        names: Sequence[str],
        tags: Sequence[str | None],
        found: list[Object],
        frames: Sequence[int],
        check: Check,
    ) -> tuple[list[Object], list[list[int]]]:
        """The objects, with those that a name has carried on by the tracker, and the numbers of each name's objects."""
        while True:
            places = assign(names, tags, [each.tag for each in found], same_things(found))
            new = [each for i, each in enumerate(found) if each.hidden is None and any(i in own for own in places)]
            if self.tracker is None or not new:
                return found, places
            chosen = _masked(video, new, check, 1)
            # What was two objects may be one afterwards, and another takes its place.
            rest = [each for each in found if each not in new]
            found = carry(self.tracker, video, [*rest, *chosen], chosen, frames, check)


def _masked(video: Path, objects: Sequence[Object], check: Check, first: int | None = None) -> list[Object]:
    """The objects with a mask of each detection, or of the `first` ones: the detector's, or what GrabCut finds in its box."""
    without = [{f for f, d in [*each.found.items()][:first] if d.mask is None} for each in objects]
    made = [replace(each, found=dict(each.found)) for each in objects]
    for index, frame in frames_until(video, set().union(*without), check):
        for each, own in zip(made, without):
            if index in own:
                each.found[index] = _with_mask(frame, each.found[index])
    return made


def _with_mask(frame: np.ndarray, found: Detection) -> Detection:
    box = filled(found.box.clip(0), frame.shape)
    mask = encode_mask(object_pixels(opencv(), frame, box)) if box.any() else None
    return Detection(found.tag, found.box, found.score, mask)


def frames_every(times: np.ndarray, span: tuple[int, int], step: float) -> set[int]:
    """The frames shown at or after each `step` seconds of a span, beginning with its first, and its last."""
    own = times[slice(*span)]
    moments = np.arange(own[0], own[-1] + _ROUNDING / 2, max(step, 0.001))
    return {span[0] + int(index) for index in np.searchsorted(own, moments - _ROUNDING)} | {span[1] - 1}


def _rate(times: np.ndarray) -> float:
    """Frames per second on average; 10 for a single frame."""
    return float((len(times) - 1) / (times[-1] - times[0])) if times[-1] > times[0] else 10.0
