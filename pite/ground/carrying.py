"""Objects carried from their first detection on by a video model: a mask in each frame looked at, and one identity.

The model finds an object again after it was hidden. What the detector has found there as a new object is then the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from dataloaders.annotation.boxes import box_ious
from dataloaders.annotation.steps import Phrase, decode_mask, encode_mask
from dataloaders.annotation.tracking import Moments
from dataloaders.annotation.video_masks import VideoTracker
from pite.ground.objects import SAME, Detection, Object


def carry(tracker: VideoTracker, video: Path, objects: Sequence[Object], frames: Sequence[int]) -> list[Object]:
    """The objects with the tracker's masks and boxes in `frames`, those that are one object joined.

    objects  each with a mask in its first frame, or as it is, without one
    A frame has the score of its detection, or 0 where the detector found nothing. Raises DecodeError.
    """
    starts = sorted({next(iter(each.found)) for each in objects})
    groups = [[each for each in objects if next(iter(each.found)) == start] for start in starts]
    moments = [Moments(np.array([frame for frame in frames if frame >= start])) for start in starts]
    masks = [[_mask(next(iter(each.found.values()))) for each in group] for group in groups]
    phrases = [[Phrase(each.tag, 0) for each in group] for group in groups]
    carried = {
        id(groups[event.number][j]): _carried(groups[event.number][j], event.moments, small)
        for event in tracker.carry(video, moments, masks, phrases)
        for j, small in event.carried.items()
    }
    return _joined([carried.get(id(each), each) for each in objects])


def _mask(found: Detection) -> np.ndarray | None:
    return None if found.mask is None else decode_mask(found.mask, found.tag)


def _carried(each: Object, moments: Moments, masks: Sequence[np.ndarray]) -> Object:
    """An object with a detection for each of its masks (h, w) that is not empty."""
    first = next(iter(each.found.values()))
    assert first.mask is not None, "it was carried"
    size = first.mask["size"]
    made, hidden = {}, []
    for frame, small in zip(moments.frames.tolist(), masks):
        mask = interpolate(torch.from_numpy(small)[None, None].float(), size, mode="bilinear")[0, 0].numpy() >= 0.5
        if not mask.any():
            hidden.append(frame)
            continue
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
        score = each.found[frame].score if frame in each.found else 0.0
        made[frame] = Detection(each.tag, box, score, encode_mask(mask))
    return replace(each, found=made, hidden=tuple(hidden)) if made else each


def _joined(objects: Sequence[Object]) -> list[Object]:
    """Without the objects that begin where an earlier one of the same tag is; that one gets their scores."""
    kept: list[Object] = []
    for new in sorted(objects, key=lambda each: next(iter(each.found))):
        start, first = next(iter(new.found.items()))
        old = next((each for each in kept if each.tag == new.tag and _is_at(each, start, first.box)), None)
        if old is None:
            kept.append(new)
            continue
        for frame, own in new.found.items():
            if frame in old.found and not old.found[frame].score:
                old.found[frame] = replace(old.found[frame], score=own.score)
    return sorted(kept, key=lambda each: (each.tag, -each.score))


def _is_at(each: Object, frame: int, box: np.ndarray) -> bool:
    return frame in each.found and bool(box_ious(each.found[frame].box[None], box)[0] >= SAME)
