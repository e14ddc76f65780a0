"""One valid record of each format, and a function that changes a record."""

from __future__ import annotations

import copy
from typing import Any

NARRATIVE: dict[str, Any] = {
    "dataset_id": "mscoco_train2017",
    "image_id": "137576",
    "annotator_id": 93,
    "caption": "In this image there are two cats, and a  sofa. A cat sleeps.",
    "timed_caption": [
        {"utterance": "In this image", "start_time": 0.0, "end_time": 1.0},
        {"utterance": "there are two cats,", "start_time": 1.0, "end_time": 2.0},
        {"utterance": "and", "start_time": 2.0, "end_time": 2.5},
        {"utterance": "a sofa.", "start_time": 2.5, "end_time": 3.0},
        {"utterance": " ", "start_time": 3.0, "end_time": 3.0},
        {"utterance": "a cat", "start_time": 4.0, "end_time": 5.0},
    ],
    "traces": [
        [{"x": 0.1, "y": 0.2, "t": 1.2}, {"x": 0.3, "y": 0.6, "t": 1.8}],
        [{"x": 0.5, "y": 0.5, "t": 2.2}, {"x": -0.05, "y": 1.05, "t": 2.7}, {"x": 0.9, "y": 0.9, "t": 4.5}],
    ],
    "voice_recording": "x.ogg",
}

PITE: dict[str, Any] = {
    "source": "internvid",
    "id": "v000001",
    "conversations": [
        {"from": "human", "value": "<video>\nDescribe the video in detail."},
        {"from": "gpt", "value": " From <s0> to <e0>, a red circle moves right. From <s1> to <e1>, a cat. </s>"},
        {"from": "human", "value": "Where is it?"},
        {"from": "gpt", "value": "The <b>circle</b> is left."},
    ],
    "meta": {
        "split": [129.8, 184.0],
        "duration": 54.2,
        "token": {"<s0>": 0.0, "<e0>": 9.4, "<s1>": 12.0, "<e1>": 54.2},
    },
    "trajectories": [
        {
            "turn": 0,
            "phrase": "a red circle",
            "start": 20,
            "times": [0.0, 54.2],
            "points": [[[0.0, 0.5], [1.0, 0.5]], [[0.25, 0.25], [-1, -1]], [[0.1, 0.1], [0.1, 0.1]]],
        },
        {"turn": 0, "phrase": "a cat", "start": 65, "times": [12.0, 20.0], "points": [[[0.5, 0.5]]] * 3},
        {"turn": 1, "phrase": "<b>circle</b>", "start": 4, "times": [0.0, 1.0], "points": [[[0.5, 0.5]]] * 3},
    ],
}

VALLEY: dict[str, Any] = {
    "source": "jukinmedia",
    "v_id": "v_001",
    "conversations": [
        {"from": "human", "value": "What happens?\n<video>"},
        {"from": "gpt", "value": "A dog</s> runs. </s>"},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "It is late."},
    ],
}

INSTRUCT: dict[str, Any] = {"q": "<video>\nWhat is it about?", "a": " A cat.</s>", "video_id": "v_k_ZXmr8pmrs"}

CAPTIONS: dict[str, Any] = {
    "id": "v_1",
    "duration": 82.73,
    "timestamps": [[0.83, 19.86], [17.37, 82.75]],
    "sentences": ["A young woman is seen.", " The girl dances. "],
}


def changed(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a record with the value at a dotted path replaced, or removed where it is Ellipsis."""
    record = copy.deepcopy(record)
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    target: Any = record
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return record
