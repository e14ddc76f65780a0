"""A file of each data set in its published form, read from the file to token ids.

File names, field names and the kinds of dirt are those of the published files; the wording is our own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from dataloaders.formats import Where, iter_json, present_formats, read_activitynet
from dataloaders.formats.activitynet import Event
from dataloaders.media import list_media
from dataloaders.records import TokenizedSample
from dataloaders.samples.dataset import StageDataset

N = 4


def narrative(dataset: str, image: str, caption: str, words: list[str], **changes: Any) -> dict[str, Any]:
    """A narrative of one utterance a second, during which the mouse stands still."""
    timed = [{"utterance": word, "start_time": float(i), "end_time": i + 0.9} for i, word in enumerate(words)]
    traces = [[{"x": 0.1 * i, "y": 0.5, "t": i + t} for t in (0.0, 0.9)] for i in range(len(words))]
    voice = f"{dataset}/{dataset}_{image}_93.ogg"
    record = {"dataset_id": dataset, "image_id": image, "annotator_id": 93, "caption": caption}
    return {**record, "timed_caption": timed, "traces": traces, "voice_recording": voice, **changes}


NARRATIVES = {
    "coco_train_localized_narratives-00000-of-00004.jsonl": [
        narrative("mscoco_train2017", "137576", "A cat, and  a dog.", ["a cat", "and", "a dog"]),
        narrative("mscoco_train2017", "9", "No trace here.", ["no trace here"], traces=...),
    ],
    "flickr30k_train_localized_narratives.jsonl": [
        narrative("Flick30k", "1000092795", "Two men\nstand. ", ["two men", " ", "stand"]),
    ],
    "ade20k_train_localized_narratives.jsonl": [
        narrative(
            "ADE20k",
            "ADE_train_00000001",
            "A wall.",
            ["a wall"],
            traces=[[{"x": -0.0533, "y": 1.02, "t": t} for t in (0, 1)]],
        ),
    ],
    "open_images_train_v6_localized_narratives-00000-of-00010.jsonl": [
        narrative("open_images_train_v6", "000b7d55b6184b08", "A tree.", ["um", "a tree"]),
    ],
}


def words_of(tokenizer: PreTrainedTokenizerBase, sample: TokenizedSample, positions: np.ndarray) -> str:
    return str(tokenizer.decode(sample.token_ids[positions].tolist())).strip()


def dataset(
    data: Path, stage: Any, tokenizer: PreTrainedTokenizerBase, budget: float = 0.0, **options: Any
) -> StageDataset:
    n = 1 if stage == 1 else N
    given = {"num_frames": n, "num_points": 1, "max_length": 2048, "available": None, "failure_budget": budget}
    return StageDataset(data, stage, tokenizer, **given, **options)


def test_localized_narratives(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = tmp_path / "stage1"
    folder.mkdir()
    for name, records in NARRATIVES.items():
        kept = [{key: value for key, value in record.items() if value is not ...} for record in records]
        (folder / name).write_bytes("".join(json.dumps(record) + "\r\n" for record in kept).encode())
    found = dataset(tmp_path, 1, tokenizer, budget=0.2)
    assert found.ids == [
        "ade20k/ADE_train_00000001:93",
        "coco/137576:93",
        "flickr30k/1000092795:93",
        "open_images/000b7d55b6184b08:93",
    ]
    (missing,) = found.malformed
    assert (missing.file, missing.line) == ("coco_train_localized_narratives-00000-of-00004.jsonl", 2)
    assert missing.reason == "field 'traces' is missing"
    wall, cat, men, tree = (found[i] for i in range(4))
    assert words_of(tokenizer, cat, cat.target_positions) == "A cat, and  a dog.</s>"
    points = [
        (words_of(tokenizer, cat, cat.trajectory_positions[cat.trajectory[:, 0, 0, 0] == x]))
        for x in np.unique(cat.trajectory[..., 0])
    ]
    assert points == ["A cat,", "and", "a dog."] and cat.trajectory[0, 0, 0].tolist() == [0.0, 0.5]
    assert wall.trajectory[0].tolist() == [[[0.0, 1.0]]], "the mouse left the image"
    assert words_of(tokenizer, men, men.target_positions) == "Two men\nstand.</s>"
    assert words_of(tokenizer, tree, tree.trajectory_positions) == "A tree."
    files = {m.key: str(m.path.relative_to(folder)) for m in list_media(tmp_path, ["stage1"]).media}
    assert files == {
        "stage1/ade20k/ADE_train_00000001": "images/ade20k/ADE_train_00000001.jpg",
        "stage1/coco/137576": "images/coco/000000137576.jpg",
        "stage1/coco/9": "images/coco/000000000009.jpg",
        "stage1/flickr30k/1000092795": "images/flickr30k/1000092795.jpg",
        "stage1/open_images/000b7d55b6184b08": "images/open_images/000b7d55b6184b08.jpg",
    }


def talk(*messages: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(messages)]


VALLEY = [
    {"source": "vatex", "v_id": "Ptf_2VRj-V0_000122_000132", "conversations": talk("What is cut?\n<video>", "Paper.")},
    {
        "source": "jukinmedia",
        "v_id": None,
        "video": "Dog vs. Cat #2.mp4",
        "conversations": talk("<video>\nWho wins?", "The cat wins.</s>", "Why?", "It is quick."),
    },
    {
        "source": "jukinmedia",
        "v_id": "1062342",
        "video": "1062342.mp4",
        "conversations": talk("<video>\nWho?", "A boy."),
    },
    {"source": "vatex", "v_id": "-8y1Q0rA3n8_000007_000017", "conversations": talk("<video>\n<video>\nWho?", "A man.")},
    {"source": "vatex", "id": "9f_Xb2aV01c_000000_000010", "conversations": talk("<video>", "It snows.")},
]


def test_valley(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    videos = tmp_path / "stage3/videos"
    videos.mkdir(parents=True)
    for name in ("Ptf_2VRj-V0.mp4", "Dog vs. Cat #2.mp4", "1062342.webm", "9f_Xb2aV01c_000000_000010.mp4"):
        (videos / name).touch()
    (tmp_path / "stage3/valley.json").write_text(json.dumps(VALLEY, indent=2))
    found = dataset(tmp_path, 3, tokenizer, budget=0.4)
    assert found.ids == ["Ptf_2VRj-V0_000122_000132", "Dog vs. Cat #2", "1062342"]
    assert [m.reason.partition(":")[0] for m in found.malformed] == ["field 'conversations[0]'"] * 2
    cat = found[1]
    assert words_of(tokenizer, cat, np.arange(cat.frame_start + N, len(cat.token_ids))).endswith(
        "Who wins? ASSISTANT: The cat wins.</s>"
    )
    last = dataset(tmp_path, 3, tokenizer, budget=0.4, turn="last")[1]
    assert words_of(tokenizer, last, last.target_positions) == "It is quick.</s>"
    media = {m.key: (m.path.name, m.clip) for m in list_media(tmp_path, ["stage3"]).media}
    assert media == {
        "stage3/Ptf_2VRj-V0_000122_000132": ("Ptf_2VRj-V0.mp4", (122.0, 132.0)),
        "stage3/Dog vs. Cat #2": ("Dog vs. Cat #2.mp4", None),
        "stage3/1062342": ("1062342.webm", None),
        "stage3/-8y1Q0rA3n8_000007_000017": ("-8y1Q0rA3n8_000007_000017.mp4", None),
        "stage3/9f_Xb2aV01c_000000_000010": ("9f_Xb2aV01c_000000_000010.mp4", None),
    }


def test_video_instruct(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    records = [
        {"q": "What is the man doing? ", "a": " He dives  twice.\n", "video_id": "v_k_ZXmr8pmrs"},
        {"q": "<video>\nHow does it end?", "a": "With a bow.</s>", "video_id": "v_-0r0HEwAYiQ"},
        {"q": "Why?", "a": "", "video_id": "v_-0r0HEwAYiQ"},
    ]
    (tmp_path / "stage3").mkdir()
    (tmp_path / "stage3/video_instruct.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    found = dataset(tmp_path, 3, tokenizer, budget=0.4)
    assert found.media == ["stage3/v_k_ZXmr8pmrs", "stage3/v_-0r0HEwAYiQ"]
    assert [m.reason for m in found.malformed] == ["record 3: field 'a': the answer is empty"]
    texts = [words_of(tokenizer, s, np.arange(s.frame_start + N, len(s.token_ids))) for s in (found[0], found[1])]
    assert texts[0] == "What is the man doing? ASSISTANT: He dives  twice.</s>"
    assert texts[1] == "How does it end? ASSISTANT: With a bow.</s>"


@pytest.mark.parametrize("name", ["val_1.json", "val_2.json"])
def test_activitynet_captions(tmp_path: Path, name: str) -> None:
    """Both published files hold the same videos with other sentences."""
    first = name == "val_1.json"
    sentences = [" A man lifts a bar.", "He drops it. "] if first else ["Weights are lifted.", " A bar falls."]
    videos = {
        "v_uqiMw7tQ1Cc": {"duration": 55.15, "timestamps": [[0.28, 55.15], [13.79, 55.19]], "sentences": sentences},
        "v_-02DygXbn6w": {"duration": 60, "timestamps": [[0, 31.5]], "sentences": ["Someone cooks."]},
    }
    folder = tmp_path / "evaluation"
    folder.mkdir()
    file = folder / "activitynet_captions.json"
    file.write_text(json.dumps(videos))
    assert [f.file for f in present_formats(tmp_path, "evaluation")] == [file.name]
    found = [read_activitynet(record, Where(file, offset), folder) for offset, _, record in iter_json(file)]
    assert [(video.id, video.media) for video in found] == [(key, f"evaluation/{key}") for key in videos]
    one, two = (text.strip() for text in sentences)
    assert found[0].events == (Event(0.28, 55.15, one), Event(13.79, 55.15, two)), "an end beyond the video is clipped"
    assert found[1].events == (Event(0.0, 31.5, "Someone cooks."),)
    assert [m.duration for m in list_media(tmp_path, ["evaluation"]).media] == [55.15, 60]
