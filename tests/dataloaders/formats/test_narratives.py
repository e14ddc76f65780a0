"""Localized Narratives: each word of the caption gets the position of the mouse, in all four subsets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.formats import read_narrative
from dataloaders.formats.narratives import MOUSE_TOLERANCE, QUESTION, narrative_media
from dataloaders.records import Media, RecordError
from tests.records import NARRATIVE, changed

WHERE = "records.jsonl:7"
FOLDER = Path("data/stage1")


def test_sample() -> None:
    sample = read_narrative(NARRATIVE, WHERE, Path("data/stage1"))
    (turn,) = sample.turns
    assert (sample.id, sample.media) == ("coco/137576:93", "stage1/coco/137576")
    assert (turn.question, turn.answer) == (QUESTION, NARRATIVE["caption"])
    points = {turn.answer[m.start : m.end]: m.trajectory for m in turn.mentions}
    # No trace was drawn during "In this image".
    assert list(points) == ["there are two cats,", "and", "a  sofa.", "A cat"]
    assert all(t.shape == (1, 1, 2) and t.dtype == np.float32 for t in points.values())
    np.testing.assert_allclose(points["there are two cats,"].ravel(), [0.2, 0.4])
    # From 2.5 to 3 s the mouse moved to a corner, was clipped there outside the image, and came back.
    instants = np.linspace(2.5, 3.0, 16)
    path = [np.interp(instants, [2.2, 2.7, 4.5], values).mean() for values in ([0.5, 0, 0.9], [0.5, 1, 0.9])]
    np.testing.assert_allclose(points["a  sofa."].ravel(), path, rtol=1e-6)


def test_media() -> None:
    folder = Path("data/stage1")
    for dataset, name, file in (
        ("mscoco_train2017", "137576", "coco/000000137576.jpg"),
        ("Flickr30k_train", "1000092795", "flickr30k/1000092795.jpg"),
        ("Flick30k_train", "36979", "flickr30k/36979.jpg"),
        ("ADE20k_train", "ADE_train_00000001", "ade20k/ADE_train_00000001.jpg"),
        ("open_images_train_v6", "000b7d55b6184b08", "open_images/000b7d55b6184b08.jpg"),
        ("OpenImages", "000b7d55b6184b08", "open_images/000b7d55b6184b08.jpg"),
        ("synthetic", "i000001", "i000001.jpg"),
    ):
        media = narrative_media({"dataset_id": dataset, "image_id": name}, WHERE, folder)
        key = f"stage1/{file.rpartition('/')[0]}/{name}".replace("//", "/")
        assert media == Media(key, folder / "images" / file, kind="image")


def test_unmatched_words_have_no_point() -> None:
    record = changed(NARRATIVE, "timed_caption.1.utterance", "There are, um, 2 cats")
    distinct = {m.trajectory.tobytes(): m for m in read_narrative(record, WHERE, FOLDER).turns[0].mentions}
    spans = [NARRATIVE["caption"][m.start : m.end] for m in distinct.values()]
    assert spans == ["there are two cats,", "and", "a  sofa.", "A cat"]
    record = changed(NARRATIVE, "timed_caption.1.utterance", "three dogs")
    spans = [NARRATIVE["caption"][m.start : m.end] for m in read_narrative(record, WHERE, FOLDER).turns[0].mentions]
    assert spans == ["and", "a  sofa.", "A cat"]


def test_by_position() -> None:
    """A quarter of the transcript is a quarter of the caption, whatever the words."""
    timed = [{"utterance": u, "start_time": 1.2, "end_time": 1.8} for u in ("aaaa", " bb  bbbbb", "dddd")]
    record = {**NARRATIVE, "caption": "0123456789abcdef" * 2, "timed_caption": timed}
    mentions = read_narrative(record, WHERE, FOLDER, narrative_timing="position").turns[0].mentions
    assert [(m.start, m.end) for m in mentions] == [(0, 8), (8, 24), (24, 32)]
    with pytest.raises(RecordError, match="it belongs to another caption"):
        read_narrative(record, WHERE, FOLDER)


def test_no_point_between_two_strokes() -> None:
    """Nothing is interpolated between two strokes, while the mouse was off the image."""
    timed = [{"utterance": "two cats", "start_time": 1.85, "end_time": 2.15}]
    record = {**NARRATIVE, "caption": "two cats", "timed_caption": timed}
    assert read_narrative(record, WHERE, FOLDER).turns[0].mentions == ()


def test_a_word_shorter_than_the_sampling_interval() -> None:
    timed = [{"utterance": "cats", "start_time": 1.5, "end_time": 1.5}]
    record = {**NARRATIVE, "caption": "cats", "timed_caption": timed}
    (mention,) = read_narrative(record, WHERE, FOLDER).turns[0].mentions
    np.testing.assert_allclose(mention.trajectory.ravel(), [0.2, 0.4])


def test_without_traces() -> None:
    sample = read_narrative(changed(NARRATIVE, "traces", []), WHERE, FOLDER)
    assert sample.turns[0].mentions == ()


def test_a_word_is_not_found_inside_another() -> None:
    record = changed(NARRATIVE, "caption", "That is a hat.")
    record["timed_caption"] = [{"utterance": "is a", "start_time": 1.0, "end_time": 2.0}]
    (mention,) = read_narrative(record, WHERE, FOLDER).turns[0].mentions
    assert (mention.start, mention.end) == (5, 9)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("caption", ..., "field 'caption' is missing"),
        ("caption", " </s>", "field 'caption': the answer is empty"),
        ("image_id", "../../etc/passwd", "cannot name a media file"),
        ("caption", "Something else.", "field 'timed_caption' has 0 of the caption's 2 words"),
        ("timed_caption.1.utterance", 3, "timed_caption[1]: field 'utterance' must be str, not int"),
        ("timed_caption.1.start_time", None, "'timed_caption[1].start_time' must be a finite number"),
        ("timed_caption.1.start_time", math.nan, "'timed_caption[1].start_time' must be a finite number"),
        ("timed_caption.1.end_time", 0.5, "'timed_caption[1]': start 1.0 s comes after end 0.5 s"),
        ("timed_caption.1", [], "'timed_caption[1]' must be an object"),
        ("traces.0.1.x", math.nan, "'traces[0]': point 1 (x nan"),
        ("traces.0.1.y", 1.0 + 2 * MOUSE_TOLERANCE, "'traces[0]': point 1 (x 0.3, y 1.2"),
        ("traces.1.0.t", math.inf, "'traces[1]': point 0"),
        ("traces.0.0.x", ..., "'traces' must hold lists of points"),
        ("traces.0.0.x", "left", "'traces' must hold lists of points"),
        ("traces", {}, "'traces' must be list"),
    ],
)
def test_refusals(path: str, value: Any, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        read_narrative(changed(NARRATIVE, path, value), WHERE, FOLDER)
    assert str(caught.value).startswith(f"{WHERE}: ") and reason in str(caught.value)
