"""What finds the things that an answer names: models by local path, or OpenCV's people detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataloaders.annotation.choices import open_detector
from dataloaders.annotation.people import PeopleDetector, names_person
from dataloaders.annotation.steps import encode_mask
from pite.ground.matching import match_words, plain
from pite.ground.objects import Detection

PERSON = "person"
_MOST = 50
"""Boxes of a kind in a frame, of which most are of the same things."""


class People:
    """OpenCV's people detector, which needs no weights. It finds no other things. Raises ValueError without OpenCV's."""

    def __init__(self) -> None:
        try:
            self._detector = PeopleDetector()
        except ValueError as error:
            raise ValueError(f"give --detector a model's folder, or install OpenCV's: {error}") from None

    def tags(self, phrases: Sequence[str]) -> list[str]:
        return [PERSON] if any(names_person(phrase) for phrase in phrases) else []

    def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]:
        if PERSON not in tags:
            return []
        return [Detection(PERSON, box, float(score)) for box, score in zip(*self._detector.find(image))]


class OpenVocabulary:
    """A detector of `dataloaders.annotation.choices`, with an optional SAM for masks: looks for the phrases themselves.

    Raises ValueError as `open_detector`.
    """

    def __init__(self, detector: Path, segmenter: Path | None, device: str, threshold: float) -> None:
        self._detector = open_detector(detector, segmenter, device, threshold)

    def tags(self, phrases: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(plain(phrase) for phrase in phrases))

    def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]:
        found = self._detector.find_all(image, tags)
        return [
            Detection(tag, box, score, None if mask is None else encode_mask(mask))
            for tag, things in zip(tags, found)
            for box, score, mask in things
        ]


class CocoThings:
    """Finds COCO's 80 kinds of things with the coco-ssd of TensorFlow.js. Raises ValueError as `coco_ssd.CocoSsd`."""

    def __init__(self, folder: Path, device: str, threshold: float) -> None:
        from pite.ground.coco_ssd import NUMBERS, CocoSsd

        self._ssd, self._numbers, self._threshold = CocoSsd(folder, device), NUMBERS, threshold

    def tags(self, phrases: Sequence[str]) -> list[str]:
        matched = match_words(phrases, [*self._numbers])
        return [name for name in self._numbers if name in matched]

    def __call__(self, image: np.ndarray, tags: Sequence[str]) -> list[Detection]:
        boxes, scores = self._ssd(image)
        return [
            Detection(tag, boxes[row], float(own[row]))
            for tag in tags
            for own in [scores[:, self._numbers[tag]]]
            for row in np.argsort(-own, kind="stable")[:_MOST]
            if own[row] >= self._threshold
        ]
