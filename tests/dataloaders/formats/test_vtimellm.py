"""Records in the form of VTimeLLM's stage 2: marks in questions and answers, several turns, no trajectories.

The field names and the ways of asking are those of the published file; the wording is our own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dataloaders.formats import read_pite
from dataloaders.formats.pite_143k import pite_media
from dataloaders.records import Media, RecordError
from dataloaders.samples.dataset import StageDataset
from tests.records import changed

WHERE, FOLDER = "stage2.json:1:2", Path("data/stage2")


def record(name: str, split: list[float], marks: dict[str, float], *messages: str) -> dict[str, Any]:
    """A record of `messages`, questions and answers in turn, on a clip of its source."""
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(messages)]
    meta = {"split": split, "duration": round(split[1] - split[0], 3), "token": marks}
    return {"source": "internvid", "id": name, "conversations": turns, "meta": meta}


DENSE = record(
    "-0edUL8zmA8",
    [129.8, 184.0],
    {"<s0>": 0.0, "<e0>": 9.4, "<s1>": 12, "<e1>": 54.2},
    "<video>\nList what happens, with the frames of each event.",
    "From <s0> to <e0>, a man opens a door. From <s1> to <e1>, he walks a dog.",
)
WHAT = record(
    "B1x9eR_4k7o",
    [0.0, 40.0],
    {"<s0>": 10.0, "<e0>": 20.0},
    "<video>\nWhat goes on from <s0> to <e0>?",
    "A kettle boils on a stove.",
)
WHEN = record(
    "c-3_Hq0uWfA",
    [4.0, 24.0],
    {"<s0>": 5.0, "<e0>": 15.0},
    "<video>\nWhen does a child climb a tree?",
    "From <s0> to <e0>.</s>",
)
MANY = record(
    "Zq2m7vN0_hE",
    [60.0, 160.0],
    {"<s0>": 0.0, "<e0>": 30.0, "<s1>": 31.0, "<e1>": 99.96, "<s10>": 50.0},
    "<video>\nWhat can be seen between <s0> and <e0>?",
    "Two women cook.",
    "And from <s1> to <e1>?",
    "They eat, and one leaves at <s10>.",
    "When do they cook?",
    "Between <s0> and <e0>. ",
)
TAG_LAST = record("k__9aPq3L0w", [1.0, 3.0], {"<s0>": 1.0, "<e0>": 2.0}, "What ends at <e0>?\n<video>", "A song.")
WHOLE = {**changed(WHAT, "meta.split", None), "id": "v5TqYw-81bM"}
NO_MARKS = changed(record("r0-XyZ12345", [0, 8], {}, "<video>\nIs it day?", "Yes."), "meta.token", ...)
RECORDS = [DENSE, WHAT, WHEN, MANY, TAG_LAST, WHOLE, NO_MARKS]


def turns_of(one: dict[str, Any]) -> list[tuple[str, str]]:
    sample = read_pite(one, WHERE, FOLDER, num_frames=100, num_points=3)
    return [(turn.question, turn.answer) for turn in sample.turns]


def test_marks_are_resolved_in_questions_and_answers() -> None:
    dense = "From 00 to 17, a man opens a door. From 22 to 99, he walks a dog."
    assert turns_of(DENSE) == [("List what happens, with the frames of each event.", dense)]
    assert turns_of(WHAT) == turns_of(WHOLE) == [("What goes on from 25 to 50?", "A kettle boils on a stove.")]
    assert turns_of(WHEN) == [("When does a child climb a tree?", "From 25 to 75.")]
    assert turns_of(TAG_LAST) == [("What ends at 99?", "A song.")]
    assert turns_of(NO_MARKS) == [("Is it day?", "Yes.")]


def test_all_turns_of_a_record() -> None:
    assert turns_of(MANY) == [
        ("What can be seen between 00 and 30?", "Two women cook."),
        ("And from 31 to 99?", "They eat, and one leaves at 50."),
        ("When do they cook?", "Between 00 and 30."),
    ]


def test_clips() -> None:
    path = FOLDER / "videos/B1x9eR_4k7o.mp4"
    assert pite_media(WHAT, WHERE, FOLDER) == Media("stage2/B1x9eR_4k7o", path, clip=(0.0, 40.0))
    assert pite_media(WHOLE, WHERE, FOLDER).clip is None


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("conversations.2.value", "And at <s7>?", "field 'conversations[2]': mark <s7> has no time in 'meta.token'"),
        ("conversations.5.value", "At <e3>.", "field 'conversations[5]': mark <e3> has no time in 'meta.token'"),
        ("meta.token", None, "field 'conversations[0]': mark <s0> has no time in 'meta.token'"),
        ("meta.token.<s0>", "0.0", "field 'meta.token.<s0>' must be a finite number of seconds, not '0.0'"),
    ],
)
def test_marks_without_a_time_are_refused(path: str, value: Any, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        turns_of(changed(MANY, path, value))
    assert str(caught.value) == f"{WHERE}: {reason}"


@pytest.mark.parametrize("trajectories", [5, {"turn": 0}, "none"])
def test_trajectories_that_are_no_list_are_refused(trajectories: object) -> None:
    with pytest.raises(RecordError, match=r"field 'trajectories' must be list, not"):
        turns_of({**DENSE, "trajectories": trajectories})


def test_no_mark_reaches_a_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The seven records in one JSON array, as published, read to token ids."""
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2/pite_143k.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    options = {"num_frames": 100, "num_points": 3, "max_length": 2048, "available": None, "failure_budget": 0.0}
    dataset = StageDataset(tmp_path, 2, tokenizer, **options)  # type: ignore[arg-type]
    assert dataset.ids == [one["id"] for one in RECORDS] and not dataset.coordinates.any()
    texts = [tokenizer.decode(dataset[i].token_ids[dataset[i].frame_start + 100 :]) for i in range(len(dataset))]
    assert not [text for text in texts if "<s1" in text or "<s0" in text or "<e" in text]
    assert texts[1] == "\nWhat goes on from 25 to 50? ASSISTANT: A kettle boils on a stove.</s>"
    supervised = tokenizer.decode(dataset[3].token_ids[dataset[3].target_positions])
    assert supervised.count("</s>") == 3 and "one leaves at 50." in supervised
