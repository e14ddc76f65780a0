"""A tracker carries objects on: one identity after a thing was hidden, and no box while it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataloaders.annotation.boxes import box_ious
from dataloaders.annotation.steps import decode_mask
from dataloaders.annotation.video_masks import HALVES, Event, VideoTracker, objects
from pite.ground.grounding import Grounder
from pite.ground.objects import Detection, Object
from tests.pite.ground.squares import Colours, Squares, parse, place, write_squares

HIDDEN = range(6, 14)


class ByColour(VideoTracker):
    """Carries the most saturated colour of a mask."""

    device, size, colours = torch.device("cpu"), (96, 128), HALVES

    def advance(self, event: Event, frame: torch.Tensor, index: int) -> None:
        if event.session is None:
            inside = [frame[0, :, torch.from_numpy(mask)].mean(1) for _, mask in objects(event.masks)]
            event.session = [int(colour.argmax()) for colour in inside]
        for (j, _), channel in zip(objects(event.masks), event.session):
            event.add(j, index, ((frame[0].argmax(0) == channel) & (frame[0, channel] > 0)).numpy())


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red and a blue square that are hidden for a while, and come back elsewhere."""
    return write_squares(tmp_path_factory.mktemp("carried") / "a.mp4", "red", "blue", hidden=HIDDEN)


def test_an_object_is_the_same_after_it_was_hidden(video: Path) -> None:
    text = "a red square and a blue square"
    alone = Grounder(parse, Colours(), every=0.1)(video, text)
    carried = Grounder(parse, Colours(), every=0.1, tracker=ByColour())(video, text)
    assert [max(each.found) for each in alone.objects] == [5, 5], "what comes back is another object"
    assert [own for _, own in carried.phrases] == [(0,), (1,)]
    shown = [frame for frame in range(20) if frame not in HIDDEN]
    for each, colour in zip(carried.objects, ("red", "blue")):
        boxes = each.boxes()
        assert list(boxes) == shown and each.hidden == tuple(HIDDEN)
        assert min(box_ious(box[None], place(colour, frame))[0] for frame, box in boxes.items()) > 0.9
        masks = [decode_mask(found.mask, "mask") for found in each.found.values()]
        assert all(mask.shape == (96, 128) and 500 < mask.sum() < 620 for mask in masks)
        assert each.score == pytest.approx(0.9 * len(shown)), "of the detections of both its halves"


def test_only_frames_looked_at_are_carried_and_those_between_two_masks_have_a_box(video: Path) -> None:
    (red,) = Grounder(parse, Colours(masked=False), every=0.2, tracker=ByColour())(video, "a red square").objects
    assert list(red.found) == [0, 2, 4, 14, 16, 18, 19]
    assert list(red.boxes()) == [0, 1, 2, 3, 4, *range(14, 20)]


class Forgetful(ByColour):
    """Loses everything after the first frame."""

    def advance(self, event: Event, frame: torch.Tensor, index: int) -> None:
        for j, mask in objects(event.masks):
            event.add(j, index, mask if event.session is None else np.zeros((96, 128), bool))
        event.session = True


def test_what_the_detector_sees_is_kept_where_the_tracker_loses_it(video: Path) -> None:
    (red,) = Grounder(parse, Colours(), every=0.1, tracker=Forgetful())(video, "a red square").objects
    assert list(red.found) == list(red.boxes()) == list(range(6))
    assert red.hidden == tuple(range(6, 20)), "another square begins at 14"


def test_only_what_a_phrase_has_is_carried(video: Path) -> None:
    """Of the squares, two before they were hidden and two after it, "a square" is one."""
    carried: list[int] = []

    class Counting(ByColour):
        def carry(self, *arguments: Any) -> list[Event]:
            events = super().carry(*arguments)
            carried.append(sum(len(event.carried) for event in events))
            return events

    (square,) = Grounder(parse, Squares(), every=0.1, tracker=Counting())(video, "a square").objects
    assert carried == [1] and list(square.boxes()) == [*range(6), *range(14, 20)]
    assert len(Grounder(parse, Squares(), every=0.1, tracker=Counting())(video, "two squares").objects) == 2


def test_a_check_ends_the_work_while_objects_are_carried(video: Path) -> None:
    frames: list[None] = []

    def check() -> None:
        frames.append(None)
        if len(frames) == 25:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Grounder(parse, Colours(), every=0.1, tracker=ByColour())(video, "a red square", check=check)
    assert len(frames) == 25, "20 are looked at by the detector"


def test_boxes_of_a_hidden_object() -> None:
    found = {frame: Detection("dog", np.full(4, float(frame)), 0.5) for frame in (2, 4, 8, 10)}
    assert list(Object("dog", found).boxes()) == list(range(2, 11))
    boxes = Object("dog", found, hidden=(6, 12)).boxes()
    assert list(boxes) == [2, 3, 4, 8, 9, 10] and boxes[3].tolist() == [3.0] * 4
