"""An answer and a video to objects over time: noun phrases, tags, detections, identities, matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.annotation.appearance import object_pixels
from dataloaders.annotation.steps import Phrase, encode_mask
from dataloaders.annotation.tracking import count_frames, opencv
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.video import iter_frames, probe
from pite.ground.matching import assign, match_by_model, match_words
from pite.ground.objects import Detection, Detector, Object, join

Parser = Callable[[str], list[Phrase]]
MAX_OBJECTS = 20
"""Objects of a phrase such as "people"."""


@dataclass(frozen=True)
class Grounded:
    """A text and the objects of its phrases in a video.

    size     width and height of the frames
    fps      frames per second; 10 for a file without times
    span     first frame looked at, and the frame after the last
    phrases  the noun phrases, each with the numbers of its objects
    objects  all objects that a phrase has, with their masks in the frames of their detections
    """

    text: str
    size: tuple[int, int]
    fps: float
    span: tuple[int, int]
    phrases: tuple[tuple[Phrase, tuple[int, ...]], ...]
    objects: tuple[Object, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: boxes in pixels, right and bottom edges outside; masks in COCO's uncompressed run lengths."""
        return {
            "answer": self.text,
            "size": list(self.size),
            "fps": round(self.fps, 3),
            "frames": list(self.span),
            "phrases": [{"phrase": p.text, "start": p.start, "objects": list(o)} for p, o in self.phrases],
            "objects": [
                {
                    "tag": each.tag,
                    "score": round(each.score, 3),
                    "boxes": {str(frame): np.round(box, 1).tolist() for frame, box in each.boxes().items()},
                    "masks": {str(f): encode_mask(d.mask) for f, d in each.found.items() if d.mask is not None},
                }
                for each in self.objects
            ],
        }


@dataclass(frozen=True)
class Grounder:
    """Grounds texts in videos. It keeps nothing of a video, so the order of the videos changes nothing.

    parser    sentence -> its noun phrases
    detector  finds things
    complete  prompt -> a language model's continuation, which matches phrases and tags; None matches by words
    every     seconds between two frames in which things are looked for
    """

    parser: Parser
    detector: Detector
    complete: Callable[[str], str] | None = None
    every: float = 0.4

    def __call__(self, video: Path, text: str, seconds: tuple[float, float] | None = None) -> Grounded:
        """Ground a text in a video, or in the part between two times. Raises DecodeError."""
        size, fps, span = _facts(video, seconds)
        phrases = self.parser(text)
        tags = self.detector.tags([phrase.text for phrase in phrases])
        if self.complete is None or not phrases or not tags:
            matched = match_words(phrases, tags)
        else:
            matched = match_by_model(phrases, tags, text, self.complete)
        wanted = [tag for tag in tags if tag in matched.values()]
        step = max(1, round(fps * self.every))
        objects = join(self._detections(video, span, step, wanted)) if wanted else []
        of_tag = {tag: [each for each in objects if each.tag == tag][:MAX_OBJECTS] for tag in wanted}
        places = assign(phrases, matched, {tag: len(those) for tag, those in of_tag.items()})
        shown: list[Object] = []
        found = []
        for phrase in phrases:
            own = [of_tag[matched[phrase]][place] for place in places.get(phrase, ())]
            shown += [each for each in own if all(each is not other for other in shown)]
            found.append((phrase, tuple(next(i for i, o in enumerate(shown) if o is each) for each in own)))
        masked = tuple(self._masked(video, shown))
        return Grounded(text, size, fps, span, tuple(found), masked)

    def _detections(
        self, video: Path, span: tuple[int, int], step: int, tags: Sequence[str]
    ) -> Iterator[tuple[int, list[Detection]]]:
        for index, frame in frames_of(video, set(range(span[0], span[1], step))):
            yield index, self.detector(frame, tags)

    def _masked(self, video: Path, objects: Sequence[Object]) -> list[Object]:
        """The objects with a mask of each detection: the detector's, or what GrabCut finds in its box."""
        lacking = {f for each in objects for f, d in each.found.items() if d.mask is None}
        made = [Object(each.tag, dict(each.found)) for each in objects]
        for index, frame in frames_of(video, lacking):
            for each in made:
                if index in each.found and each.found[index].mask is None:
                    each.found[index] = _with_mask(frame, each.found[index])
        return made


def _with_mask(frame: np.ndarray, found: Detection) -> Detection:
    box = np.zeros(frame.shape[:2], bool)
    left, top, right, bottom = found.box.round().astype(int)
    box[max(top, 0) : bottom, max(left, 0) : right] = True
    mask = object_pixels(opencv(), frame, box) if box.any() else None
    return Detection(found.tag, found.box, found.score, mask)


def _facts(video: Path, seconds: tuple[float, float] | None) -> tuple[tuple[int, int], float, tuple[int, int]]:
    """Width and height, frames per second, and the frames between two times."""
    known = probe(video)
    first, total = count_frames(video)
    times = known.packets.times
    fps = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 10.0
    span = (first, first + total)
    if seconds is not None:
        start, end = (round(second * fps) for second in seconds)
        span = min(start, total - 1), min(max(end, start + 1), total)
    frame = next(frame for frame in iter_frames(video, {0}) if frame is not None)
    return (frame.shape[1], frame.shape[0]), fps, span


def frames_of(video: Path, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The frames `wanted` of a video with their indices. Raises DecodeError where the file ends before."""
    for index, frame in enumerate(iter_frames(video, wanted) if wanted else ()):
        if frame is not None:
            yield index, frame
        if index == max(wanted):
            return
    if wanted:
        raise DecodeError(f"{video}: ends before frame {max(wanted)}, which its packets promise")
