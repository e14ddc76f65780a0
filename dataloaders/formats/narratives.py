"""Localized Narratives: a still image, a caption read aloud, and the mouse trace that the reader drew meanwhile.

The caption was typed, and its timing comes from a transcript of the voice. The two mostly agree, word for word. The
words are matched, so that a token of the caption gets the time of the word that it is part of.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from dataloaders.formats.fields import Place, Within, answer_of, field, identifier, seconds
from dataloaders.formats.stream import Record
from dataloaders.records import Media, Mention, RecordError, Sample, Turn

NarrativeTiming = Literal["words", "position"]

QUESTION = "Describe this image."

MOUSE_TOLERANCE = 0.1
"""How far outside the image the mouse may be, in fractions of the image; it is clipped to the edge."""

TRACE_SAMPLES = 16
"""Samples of the mouse during an utterance (PixelLLM's number), evenly spaced, both ends included."""

MIN_COMMON = 0.5
"""Minimum share of the caption's words that its transcript must contain."""

_SUBSETS = {"coco": "coco", "flic": "flickr30k", "ade": "ade20k", "open": "open_images"}
"""Part of a `dataset_id`, in lower case, and the folder of its images."""

_EDGES = re.compile(r"^\W+|\W+$")


def narrative_media(record: Record, where: Place, folder: Path) -> Media:
    """The image `folder`/images/SUBSET/NAME.jpg, by `dataset_id` and `image_id`.

    SUBSET is coco, flickr30k, ade20k or open_images. NAME is the id, padded to twelve digits for COCO, as in its file
    names. Images of any other data set are in `folder`/images itself.
    """
    name, dataset = identifier(record, "image_id", where), str(record.get("dataset_id", "")).lower()
    subset = next((subset for part, subset in _SUBSETS.items() if part in dataset), None)
    if subset is None:
        return Media(f"{folder.name}/{name}", folder / "images" / f"{name}.jpg", kind="image")
    file = name.zfill(12) if subset == "coco" else name
    return Media(f"{folder.name}/{subset}/{name}", folder / "images" / subset / f"{file}.jpg", kind="image")


def read_narrative(
    record: Record, where: Place, folder: Path, *, narrative_timing: NarrativeTiming = "words"
) -> Sample:
    """The caption as the answer to QUESTION. The point of each utterance is the mean position of the mouse during it.

    narrative_timing  "words": an utterance covers its words in the caption, and unmatched words have no point;
                      "position": an utterance covers the same share of the caption's characters as of the transcript's,
                      whatever the words (the rule of PixelLLM's recipe)
    An utterance without a trace has no mention. Raises RecordError with place and field for the transcript of another
    caption, and for points further than MOUSE_TOLERANCE outside the image.
    """
    caption = answer_of(field(record, "caption", str, where), "caption", where)
    traces = _traces(field(record, "traces", list, where), where)
    utterances, points = [], []
    for i, utterance in enumerate(field(record, "timed_caption", list, where)):
        name = f"timed_caption[{i}]"
        if not isinstance(utterance, dict):
            raise RecordError(f"{where}: field '{name}' must be an object")
        text = field(utterance, "utterance", str, Within(where, name))
        start, end = (seconds(utterance.get(key), f"{name}.{key}", where) for key in ("start_time", "end_time"))
        if start > end:
            raise RecordError(f"{where}: field '{name}': start {start} s comes after end {end} s")
        utterances.append(text)
        points.append(_mean_position(traces, start, end))
    find = _spans_by_words if narrative_timing == "words" else _spans_by_position
    spans = find(caption, utterances, where)
    mentions = tuple(
        Mention(*span, point.astype(np.float32).reshape(1, 1, 2))
        for span, point in zip(spans, points)
        if span is not None and point is not None
    )
    media = narrative_media(record, where, folder)
    number = f"{media.key.partition('/')[2]}:{record.get('annotator_id', 0)}"
    return Sample(number, media.key, (Turn(QUESTION, caption, mentions),))


_Span = tuple[int, int]


def _spans_by_words(caption: str, utterances: list[str], where: Place) -> list[_Span | None]:
    """The span from an utterance's first matched word in the caption to its last; None without a match."""
    words = [(match.span(), _plain(match[0])) for match in re.finditer(r"\S+", caption)]
    transcript = [(number, _plain(word)) for number, utterance in enumerate(utterances) for word in utterance.split()]
    matcher = SequenceMatcher(None, [word for _, word in words], [word for _, word in transcript], autojunk=False)
    spans: list[_Span | None] = [None] * len(utterances)
    common = 0
    for in_caption, in_transcript, size in matcher.get_matching_blocks():
        common += size
        for k in range(size):
            (begin, end), number = words[in_caption + k][0], transcript[in_transcript + k][0]
            known = spans[number]
            spans[number] = (begin, end) if known is None else (known[0], end)
    if transcript and common < MIN_COMMON * len(words):
        raise RecordError(
            f"{where}: field 'timed_caption' has {common} of the caption's {len(words)} words: "
            "it belongs to another caption"
        )
    return spans


def _plain(word: str) -> str:
    """A word in lower case, without punctuation at its edges; a word of punctuation only stays."""
    return _EDGES.sub("", word).casefold() or word


def _spans_by_position(caption: str, utterances: list[str], where: Place) -> list[_Span | None]:
    """Spans with the same share of the caption's characters as of the transcript's."""
    lengths = np.array([len(" ".join(utterance.split())) for utterance in utterances], dtype=np.float64)
    if not lengths.sum():
        return [None] * len(utterances)
    edges = np.rint(np.concatenate([[0.0], lengths.cumsum()]) / lengths.sum() * len(caption)).astype(int).tolist()
    return [(begin, end) if end > begin else None for begin, end in pairwise(edges)]


def _mean_position(traces: list[np.ndarray], start: float, end: float) -> np.ndarray | None:
    """Mean (x, y) of the interpolated mouse over [start, end] seconds; None without a trace."""
    instants = np.linspace(start, end, TRACE_SAMPLES)
    seen = []
    for trace in traces:
        first, last = trace[0, 2], trace[-1, 2]
        if first <= end and last >= start:
            during = instants[(instants >= first) & (instants <= last)]
            seen += [(np.interp(during, trace[:, 2], trace[:, 0]), np.interp(during, trace[:, 2], trace[:, 1]))]
    found = np.concatenate(seen, axis=1) if seen else np.empty((2, 0))
    return found.mean(1) if found.size else None


def _traces(segments: list[list[dict[str, float]]], where: Place) -> list[np.ndarray]:
    """Strokes (n, 3) float64 in order of time: x, y clipped to the image, t in seconds."""
    traces = []
    for number, segment in enumerate(segments):
        try:
            rows = [(p["x"], p["y"], p["t"]) for p in segment]
            points = np.array(rows, dtype=np.float64).reshape(-1, 3)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise RecordError(f"{where}: field 'traces' must hold lists of points with numbers x, y and t") from None
        # A comparison with NaN is false, so NaN is refused here as well.
        inside = ((points[:, :2] >= -MOUSE_TOLERANCE) & (points[:, :2] <= 1 + MOUSE_TOLERANCE)).all(1)
        good = inside & np.isfinite(points[:, 2])
        if not good.all():
            i = int(np.argmin(good))
            x, y, t = points[i]
            raise RecordError(
                f"{where}: field 'traces[{number}]': point {i} (x {x:g}, y {y:g}, t {t:g}) is not in the image"
            )
        points[:, :2] = points[:, :2].clip(0.0, 1.0)
        if len(points):
            traces.append(points[np.argsort(points[:, 2], kind="stable")])
    return traces
