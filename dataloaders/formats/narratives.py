"""Localized Narratives: a still image, a spoken caption, and the mouse that points while its speaker talks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from dataloaders.formats.fields import Place, Within, answer_of, field, identifier, seconds
from dataloaders.formats.stream import Record
from dataloaders.records import Media, Mention, RecordError, Sample, Turn

QUESTION = "Describe this image."

MOUSE_TOLERANCE = 0.1
"""How far, in fractions of the image, the mouse may slip off it and still be clipped to its edge."""


def narrative_media(record: Record, where: Place, folder: Path) -> Media:
    """The image `folder`/images/{image_id}.jpg."""
    name = identifier(record, "image_id", where)
    return Media(f"{folder.name}/{name}", folder / "images" / f"{name}.jpg", kind="image")


def read_narrative(record: Record, where: Place, folder: Path) -> Sample:
    """The caption as the answer to QUESTION; each utterance points at the mean of the mouse trace while it was spoken.

    Utterances are found in the caption in order, whatever their case and spacing. One without a trace point between
    its `start_time` and `end_time` gets no mention. Raises RecordError naming place and field for utterances that are
    not in the caption and for points further than MOUSE_TOLERANCE outside the image.
    """
    caption = answer_of(field(record, "caption", str, where), "caption", where)
    trace = _trace(field(record, "traces", list, where), where)
    mentions, cursor = [], 0
    for i, utterance in enumerate(field(record, "timed_caption", list, where)):
        name = f"timed_caption[{i}]"
        if not isinstance(utterance, dict):
            raise RecordError(f"{where}: field '{name}' must be an object")
        words = field(utterance, "utterance", str, Within(where, name)).split()
        if not words:
            continue
        # Word edges keep "a" from being found inside a longer word when an earlier utterance went astray.
        pattern = r"(?<!\w)" * words[0][0].isalnum() + r"\s+".join(map(re.escape, words))
        match = re.compile(pattern + r"(?!\w)" * words[-1][-1].isalnum(), re.IGNORECASE).search(caption, cursor)
        if match is None:
            raise RecordError(
                f"{where}: field '{name}.utterance': {' '.join(words)!r} is not in the rest of the caption, "
                f"{caption[cursor:]!r}"
            )
        cursor = match.end()
        start, end = (seconds(utterance.get(key), f"{name}.{key}", where) for key in ("start_time", "end_time"))
        if start > end:
            raise RecordError(f"{where}: field '{name}': start {start} s comes after end {end} s")
        during = trace[(trace[:, 2] >= start) & (trace[:, 2] <= end), :2]
        if len(during):
            point = during.mean(0).astype(np.float32).reshape(1, 1, 2)
            mentions.append(Mention(match.start(), match.end(), point))
    media = narrative_media(record, where, folder)
    turn = Turn(QUESTION, caption, tuple(mentions))
    annotator = record.get("annotator_id", 0)
    return Sample(f"{identifier(record, 'image_id', where)}:{annotator}", media.key, (turn,))


def _trace(segments: list[list[dict[str, float]]], where: Place) -> np.ndarray:
    """All points of all segments, (n, 3) float64: x, y clipped to the image, t in seconds."""
    try:
        rows = [(p["x"], p["y"], p["t"]) for segment in segments for p in segment]
        points = np.array(rows, dtype=np.float64).reshape(-1, 3)
    except (KeyError, TypeError, ValueError):
        raise RecordError(f"{where}: field 'traces' must hold lists of points with numbers x, y and t") from None
    # A comparison with NaN is false, so NaN is refused here as well.
    inside = ((points[:, :2] >= -MOUSE_TOLERANCE) & (points[:, :2] <= 1 + MOUSE_TOLERANCE)).all(1)
    good = inside & np.isfinite(points[:, 2])
    if not good.all():
        i = int(np.argmin(good))
        x, y, t = points[i]
        raise RecordError(f"{where}: field 'traces': point {i} (x {x:g}, y {y:g}, t {t:g}) is not in the image")
    points[:, :2] = points[:, :2].clip(0.0, 1.0)
    return points
