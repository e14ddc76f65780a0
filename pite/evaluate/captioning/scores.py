"""SODA_c, METEOR and CIDEr of dense captions (Krishna et al., Dense-Captioning Events in Videos, ICCV 2017).

METEOR and CIDEr: each prediction is paired with every reference that it overlaps by at least a tIoU, or with a word that
matches nothing. A video's score is that of its pairs (CIDEr takes its document frequencies from them too, so a single
pair has CIDEr 0); the mean over the videos is averaged over the tIoUs. The published word is a random string, drawn anew
in each run. Here it is always the same one: METEOR and CIDEr see that a token differs, not how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from pite.evaluate.captioning.answers import Caption
from pite.evaluate.captioning.java import Meteor, Pair, tokenize
from pite.evaluate.captioning.soda import f_measure, ious
from pite.evaluate.protocols import Protocol

TIOUS = (0.3, 0.5, 0.7, 0.9)
NO_MATCH = "qzxvkjwqzxvkjw"
"""Reference of a prediction without one. It is one token, and a part of no word."""


@dataclass(frozen=True)
class Video:
    """A video's predictions, and the references of each annotator, by the annotator's number."""

    predicted: tuple[Caption, ...]
    references: Mapping[int, tuple[Caption, ...]]


def caption_scores(videos: Sequence[Video], protocol: Protocol) -> dict[str, float]:
    """soda_c, METEOR and CIDEr in percent over `videos`, of which one without predictions counts as 0.

    `published` calls METEOR with prediction and reference swapped for SODA_c. Raises ValueError without videos, without
    Java, and if one of its processes ends early.
    """
    if not videos:
        raise ValueError("there is no video with captions to score")
    tokens = tokenize(caption.sentence for video in videos for caption in _captions(video))
    with Meteor() as meteor:
        soda = _soda(videos, tokens, meteor, swapped=protocol == "published")
        pairs = [[_pairs(video, tokens, tiou) for video in videos] for tiou in TIOUS]
        of_meteor = fmean(fmean(meteor.scores(each)[1] for each in at_tiou) for at_tiou in pairs)
    of_cider = fmean(fmean(map(_cider, at_tiou)) for at_tiou in pairs)
    return {"soda_c": 100 * soda, "METEOR": 100 * of_meteor, "CIDEr": 100 * of_cider}


def _captions(video: Video) -> Iterable[Caption]:
    yield from video.predicted
    for references in video.references.values():
        yield from references


def _soda(videos: Sequence[Video], tokens: Mapping[str, str], meteor: Meteor, swapped: bool) -> float:
    """Mean over the annotators of the mean over the videos of each."""
    of: dict[int, list[float]] = {}
    for video in videos:
        for annotator, references in video.references.items():
            of.setdefault(annotator, []).append(_soda_of(video.predicted, references, tokens, meteor, swapped))
    return fmean(map(fmean, of.values()))


def _soda_of(
    predicted: Sequence[Caption],
    references: Sequence[Caption],
    tokens: Mapping[str, str],
    meteor: Meteor,
    swapped: bool,
) -> float:
    predicted, references = (sorted(each, key=lambda caption: caption.start) for each in (predicted, references))
    if not predicted or not references:
        return 0.0
    pairs = [(tokens[p.sentence], tokens[r.sentence]) for r in references for p in predicted]
    similarity = meteor.scores([pair[::-1] for pair in pairs] if swapped else pairs)[0]
    return f_measure(ious(predicted, references) * np.reshape(similarity, (len(references), len(predicted))))


def _pairs(video: Video, tokens: Mapping[str, str], tiou: float) -> list[Pair]:
    """The pairs of a video's predictions at a tIoU."""
    references = [caption for those in video.references.values() for caption in those]
    if not video.predicted:
        return []
    near = ious(video.predicted, references) >= tiou if references else np.zeros((0, len(video.predicted)), bool)
    pairs = []
    for i, prediction in enumerate(video.predicted):
        matches = [tokens[references[j].sentence] for j in np.flatnonzero(near[:, i])] or [NO_MATCH]
        pairs += [(tokens[prediction.sentence], match) for match in matches]
    return pairs


def _cider(pairs: Sequence[Pair]) -> float:
    from pycocoevalcap.cider.cider import Cider

    if not pairs:
        return 0.0
    references = {i: [reference] for i, (_, reference) in enumerate(pairs)}
    hypotheses = {i: [hypothesis] for i, (hypothesis, _) in enumerate(pairs)}
    return float(Cider().compute_score(references, hypotheses)[0])
