"""Find the people of a frame without weights to download: OpenCV's HOG detector, for phrases that name a person.

Histograms of oriented gradients with a linear classifier (Dalal and Triggs, 2005), trained on people who stand or walk.
It does not distinguish people by sex or clothes: of two people, "the man" may be either. OpenCV 4 has it; of OpenCV 5 only
opencv-contrib-python-headless does, which replaces opencv-python-headless.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from dataloaders.annotation.boxes import filled
from dataloaders.annotation.models import Found
from dataloaders.annotation.tracking import opencv

INSTALL = (
    "OpenCV's people detector is in opencv-contrib-python-headless: pip uninstall opencv-python-headless, "
    "then pip install opencv-contrib-python-headless"
)

_NOUNS = """
adult adults athlete athletes audience babies baby boy boys bride chef child children couple couples crowd
cyclist cyclists dancer dancers driver father female gentleman gentlemen girl girls groom guy guys human humans
instructor kid kids ladies lady male man men mother mothers musician musicians passenger pedestrian pedestrians
people person persons player players runner runners singer singers skater skaters skier skiers soldier soldiers
somebody someone stranger student students surfer swimmer teacher teenager toddler walker walkers woman women
worker workers
"""

WORDS = frozenset(_NOUNS.split())
"""Nouns that name a person, as the last word of a phrase."""

_SHORTER_SIDE, _MOST_ENLARGED = 1152, 3.0
"""Frames are enlarged to this, because a person in the detector's window is about 100 pixels tall."""
_MARGINS = (0.12, 0.08)
"""Shares of the window's width and height around the person, on either side."""


class PeopleDetector:
    """Masks of people for phrases, with the interface of `Grounding`. Raises ValueError without OpenCV's detector.

    threshold  minimum distance from the classifier's border; its scores are about 0 to 2
    """

    def __init__(self, threshold: float = 0.3) -> None:
        cv2 = opencv()
        if not hasattr(cv2, "HOGDescriptor"):
            raise ValueError(INSTALL)
        self._cv2, self._threshold = cv2, threshold
        self._detector = cv2.HOGDescriptor()
        self._detector.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())

    def __call__(self, image: np.ndarray, phrases: Sequence[str]) -> list[np.ndarray | None]:
        """A mask (H, W) bool, the whole box, for each phrase in an image (H, W, 3) uint8 RGB; None where none was found.

        Different phrases get different people, the surest first.
        """
        people = list(dict.fromkeys(phrase.lower() for phrase in phrases if names_person(phrase)))
        boxes = dict(zip(people, self.boxes(image))) if people else {}
        return [filled(boxes[p.lower()], image.shape) if p.lower() in boxes else None for p in phrases]

    def find_all(self, image: np.ndarray, phrases: Sequence[str]) -> list[list[Found]]:
        """Boxes (4,) and scores of all people for each phrase that names one; masks are None."""
        people = [(box, float(score), None) for box, score in zip(*self.find(image))]
        return [list(people) if names_person(phrase) else [] for phrase in phrases]

    def boxes(self, image: np.ndarray) -> np.ndarray:
        """People (n, 4) as left, top, right and bottom in pixels of an image (H, W, 3) uint8, the surest first."""
        return self.find(image)[0]

    def find(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`boxes` and their scores (n,)."""
        height, width = image.shape[:2]
        scale = min(_MOST_ENLARGED, _SHORTER_SIDE / min(height, width))
        enlarged = self._cv2.resize(image, (round(width * scale), round(height * scale)))
        windows, scores = self._detector.detectMultiScale(enlarged, winStride=(8, 8), padding=(16, 16), scale=1.05)
        scores = np.ravel(scores)
        if not len(scores):
            return np.zeros((0, 4)), np.zeros(0)
        left, top, wide, high = np.asarray(windows, float).T / scale
        margins = np.array([wide * _MARGINS[0], high * _MARGINS[1]])
        found = np.stack((left + margins[0], top + margins[1], left + wide - margins[0], top + high - margins[1]), -1)
        found = found.clip(0, (width, height, width, height))
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= self._threshold]
        return found[order], scores[order]


def names_person(phrase: str) -> bool:
    """Whether the last word of a noun phrase is a noun for a person."""
    words = re.findall(r"[a-z]+", phrase.lower())
    return bool(words) and words[-1] in WORDS
