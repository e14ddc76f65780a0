"""Objects carried from their first detection on by a video model: a mask in each frame looked at, and one identity.

The model finds an object again after it was hidden. What the detector has found there as a new object is then the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataloaders.annotation.boxes import box_ious
from dataloaders.annotation.steps import Phrase, decode_mask, encode_mask
from dataloaders.annotation.tracking import Check, Moments, go_on
from dataloaders.annotation.video_masks import VideoTracker, resized_mask
from pite.ground.objects import SAME, Detection, Object


def carry(
    tracker: VideoTracker,
    video: Path,
    objects: Sequence[Object],
    chosen: Sequence[Object],
    frames: Sequence[int],
    check: Check = go_on,
) -> list[Object]:
    """The objects, the chosen ones with the tracker's masks and boxes in `frames`, and those that are one object joined.

    chosen  some of the objects, each with a mask in its first frame, or left as it is
    A frame has the score of its detection, or 0 where the detector found nothing. Raises DecodeError, and what `check` raises.
    """
    starts = sorted({each.first for each in chosen})
    groups = [[each for each in chosen if each.first == start] for start in starts]
    moments = [Moments(np.array([frame for frame in frames if frame >= start])) for start in starts]
    masks = [[_mask(each.found[each.first]) for each in group] for group in groups]
    phrases = [[Phrase(each.tag, 0) for each in group] for group in groups]
    carried = {each: replace(each, hidden=()) for each in chosen}
    for event in tracker.carry(video, moments, masks, phrases, check):
        for j, small in event.carried.items():
            each = groups[event.number][j]
            carried[each] = _carried(each, event.moments, small)
    return _joined([carried.get(each, each) for each in objects])


def _mask(found: Detection) -> np.ndarray | None:
    return None if found.mask is None else decode_mask(found.mask, found.tag)


def _carried(each: Object, moments: Moments, masks: Sequence[np.ndarray]) -> Object:
    """An object with a detection for each of its masks (h, w) that is not empty, else with what the detector found."""
    mask = each.found[each.first].mask
    assert mask is not None, "it was carried"
    made, hidden = {}, []
    for frame, small in zip(moments.frames.tolist(), masks):
        seen = resized_mask(small, mask["size"])
        detected = each.found.get(frame)
        if seen.any():
            rows, columns = np.nonzero(seen.any(1))[0], np.nonzero(seen.any(0))[0]
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
            made[frame] = Detection(each.tag, box, detected.score if detected else 0.0, encode_mask(seen))
        elif detected:
            made[frame] = detected
        else:
            hidden.append(frame)
    return replace(each, found=made, hidden=tuple(hidden))


def _joined(objects: Sequence[Object]) -> list[Object]:
    """Objects that begin where an earlier one of the same tag is are that one. The surest of each tag comes first."""
    kept: list[Object] = []
    for new in sorted(objects, key=lambda each: each.first):
        start, first = new.first, new.found[new.first]
        old = next((n for n, each in enumerate(kept) if each.tag == new.tag and _is_at(each, start, first.box)), None)
        if old is None:
            kept.append(new)
        else:
            kept[old] = _continued(kept[old], new)
    return sorted(kept, key=lambda each: (each.tag, -each.score))


def _is_at(each: Object, frame: int, box: np.ndarray) -> bool:
    return frame in each.found and bool(box_ious(each.found[frame].box[None], box)[0] >= SAME)


def _continued(old: Object, new: Object) -> Object:
    """An object with the detections of its later part where it has none, and their scores."""
    found = dict(old.found)
    for frame, own in new.found.items():
        known = found.get(frame, own)
        found[frame] = replace(known, score=max(known.score, own.score))
    hidden = None if old.hidden is None else tuple(frame for frame in old.hidden if frame not in found)
    return replace(old, found=dict(sorted(found.items())), hidden=hidden)
