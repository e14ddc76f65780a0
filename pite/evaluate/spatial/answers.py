"""Predicted boxes in a prediction log, and their overlap with the true ones.

    {"video_id": "2401075277", "task": "spatial_grounding", "query_id": 12, "answer": "A child in red.",
     "info": {"size": [640, 360], "boxes": {"96": [[10, 20, 110, 220]], "97": []}}}

`query_id` is the question's number in the published order. A box is left, top, right, bottom in pixels of a frame of
`size`, the right and bottom edges outside, as in the NAME.json of `pite.ground`: a box of one pixel is 1 wide. A frame is a
number of the video's file, from 0. `pite.evaluate spatial --model` writes such lines, with the `phrase` whose boxes they are,
or the `error` of a question that failed; a script can make them of the boxes of any method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dataloaders.annotation.boxes import box_ious
from dataloaders.formats.fields import is_number, shown
from pite.evaluate.predictions import Line, read_lines
from pite.evaluate.protocols import Protocol
from pite.evaluate.spatial.truth import Tube, scored

TASK = "spatial_grounding"

Boxes = Mapping[int, np.ndarray]
"""(n, 4) boxes by frame, in pixels."""


def read_answers(
    path: Path, tubes: Sequence[Tube], protocol: Protocol = "strict"
) -> dict[int, tuple[tuple[int, int], Boxes]]:
    """Frame size and boxes by the number of the question.

    protocol  strict: one box in a frame at most, since the best of many boxes, such as a grid, would fit anything;
              published: any number
    Raises ValueError, naming file, line and field.
    """
    known = {tube.query_id: tube for tube in tubes}
    lines = read_lines(path, TASK)
    if not lines:
        raise ValueError(f"{path}: holds no line whose task is {TASK!r}")
    found: dict[int, tuple[tuple[int, int], Boxes]] = {}
    for line in lines:
        number = line.prediction.query_id
        tube = known.get(number) if isinstance(number, int) else None
        if tube is None or isinstance(number, str):
            raise ValueError(f"{line}: field 'query_id' is {number!r}, which the ground truth does not have")
        if tube.video != line.prediction.video:
            raise ValueError(
                f"{line}: field 'video_id' is {line.prediction.video!r}, but question {number} is about {tube.video!r}"
            )
        size, boxes = _boxes(line)
        crowded = next((frame for frame, each in boxes.items() if len(each) > 1), None)
        if protocol == "strict" and crowded is not None:
            raise ValueError(
                f"{line}: frame {crowded} has {len(boxes[crowded])} boxes, and the best of them would count: give one box a "
                "frame, or --protocol published"
            )
        found[number] = size, boxes
    return found


def read_failures(path: Path) -> list[str]:
    """Video and reason of each question that failed. Raises ValueError as `read_answers`."""
    lines = (line.prediction for line in read_lines(path, TASK))
    return [f"{each.video}: {each.info['error']}" for each in lines if "error" in each.info]


def _boxes(line: Line) -> tuple[tuple[int, int], Boxes]:
    info = line.prediction.info
    size, boxes = info.get("size"), info.get("boxes", {})
    if not isinstance(boxes, dict):
        raise ValueError(f"{line}: field 'info.boxes' must be an object of boxes by frame, not {shown(boxes)}")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{line}: field 'info.size' must be width and height in pixels, not {shown(size)}")
    found = {}
    for frame, each in boxes.items():
        valid = frame.isdecimal() and isinstance(each, list)
        if not valid or not all(isinstance(b, list) and len(b) == 4 and all(map(is_number, b)) for b in each):
            raise ValueError(f"{line}: field 'info.boxes[{frame}]' must be boxes of four numbers, not {shown(each)}")
        found[int(frame)] = np.array(each, np.float64).reshape(-1, 4)
    return (size[0], size[1]), found


def overlap(tube: Tube, size: tuple[int, int], boxes: Boxes, protocol: Protocol = "strict") -> float:
    """Mean over the annotated frames of the largest IoU (0..1) of a frame's boxes with the true one, the published sIoU.

    A frame without a box counts 0.
    protocol  strict: every annotated frame; published: five frames a second, at most 100, and boxes that end before
              their last pixel, because the published boxes are those of masks
    """
    scale = np.array(tube.size * 2) / np.array(size * 2)
    ious = []
    for frame, true in scored(tube, protocol):
        predicted = boxes.get(frame, np.zeros((0, 4)))
        if protocol == "published":
            predicted = predicted - np.array([0, 0, 1, 1])
        ious.append(float(box_ious(predicted * scale, true).max(initial=0.0)))
    return float(np.mean(ious)) if ious else 0.0
