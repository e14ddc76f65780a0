"""Dirt of real annotation files: each bad record is refused alone, by file, line and field, and never ends a run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dataloaders.formats import read_activitynet, read_narrative, read_pite, read_valley, read_video_instruct
from dataloaders.formats.activitynet import activitynet_media
from dataloaders.formats.instructions import valley_media, video_instruct_media
from dataloaders.formats.narratives import narrative_media
from dataloaders.formats.pite_143k import pite_media
from dataloaders.media import list_media
from dataloaders.records import RecordError
from dataloaders.samples.dataset import StageDataset
from tests.records import CAPTIONS, INSTRUCT, NARRATIVE, PITE, VALLEY, changed

FOLDER = Path("data/stage")
ODD: list[Any] = [
    *(None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf")),
    *("", "x", "\0", "a\0b/c", "12", "<s9>", "../x", "/x", "x" * 6000),
    *([], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["a", "b"], [[["a", "b"]]], [{}], [[[10**400, 1]]]),
]
"""Values that a field may hold in place of the right one."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a record."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize(
    ("record", "read", "media", "options"),
    [
        (NARRATIVE, read_narrative, narrative_media, {}),
        (NARRATIVE, read_narrative, narrative_media, {"narrative_timing": "position"}),
        (PITE, read_pite, pite_media, {"num_frames": 100, "num_points": 2}),
        (VALLEY, read_valley, valley_media, {"turn": "any"}),
        (INSTRUCT, read_video_instruct, video_instruct_media, {}),
        (CAPTIONS, read_activitynet, activitynet_media, {}),
    ],
)
def test_any_value_in_any_place_is_read_or_refused(
    record: dict[str, Any], read: Callable[..., Any], media: Callable[..., Any], options: dict[str, Any]
) -> None:
    refused = 0
    for *parents, last in places(record):
        for value in ODD:
            odd = copy.deepcopy(record)
            target: Any = odd
            for key in parents:
                target = target[key]
            target[last] = value
            for function, given in ((read, options), (media, {})):
                try:
                    function(odd, "records:1", FOLDER, **given)
                except RecordError as error:
                    refused += 1
                    assert str(error).startswith("records:1: ") and len(str(error)) < 500
    assert refused > 20


GOOD = json.dumps(PITE)
BAD = {
    "half of a character in an answer": (
        GOOD.replace("a cat.", "a cat \\ud83d."),
        r"conversations[1].value': \ud83d is half of",
    ),
    "half of a character in an id": (json.dumps({**PITE, "id": "cut\ud83d"}), r"field 'id': \ud83d is half"),
    "NUL in an id": (json.dumps({**PITE, "id": "dir\0/y"}), r"field 'id' holds 'dir\x00/y', which cannot name"),
    "an endless id": (json.dumps({**PITE, "id": "y" * 5000}), "which cannot name a media file"),
    "deep nesting": (GOOD[:-1] + ', "x": ' + "[" * 50_000 + "]" * 50_000 + "}", "not valid JSON"),
    "a number of 5,000 digits": (GOOD.replace("54.2", "5" * 5000, 1), "not valid JSON"),
    "a number of 400 digits": (
        json.dumps(changed(PITE, "meta.duration", 10**400)),
        "field 'duration' must be a finite",
    ),
    "a number as text": (json.dumps(changed(PITE, "meta.duration", "54.2")), "field 'duration' must be int or float"),
    "another encoding": (GOOD.replace("a cat", "á cat").encode("latin-1"), "not valid JSON"),
    "no object": ("null", "expected a JSON object, not NoneType"),
    "cut off": (GOOD[:-30], "not valid JSON"),
    "one id, two clips": (
        json.dumps(changed(PITE, "meta.split", [0, 54.2])),
        "'stage2/v000001' is v000001.mp4 from 0 to",
    ),
}
"""What is wrong -> the line, and a part of the reason."""


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """A stage-2 file with a byte order mark, a good record, the bad ones, and as many more good ones."""
    lines = [GOOD, *(line for line, _ in BAD.values()), *(json.dumps({**PITE, "id": f"v{i}"}) for i in range(len(BAD)))]
    (tmp_path / "stage2").mkdir()
    content = b"\xef\xbb\xbf" + b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (tmp_path / "stage2/pite_143k.jsonl").write_bytes(content)
    return tmp_path


def dataset(data: Path, tokenizer: PreTrainedTokenizerBase, budget: float) -> StageDataset:
    options = {"num_frames": 100, "num_points": 3, "max_length": 2048, "available": None, "failure_budget": budget}
    return StageDataset(data, 2, tokenizer, **options)  # type: ignore[arg-type]


def test_bad_records_are_left_out_of_training_by_line(dirty: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = dataset(dirty, tokenizer, 0.5)
    assert found.ids == ["v000001", *(f"v{i}" for i in range(len(BAD)))]
    reasons = {m.line: m.reason for m in found.malformed}
    for line, (name, (_, reason)) in enumerate(BAD.items(), 2):
        assert reason in reasons.pop(line), name
    assert not reasons and f"{len(BAD)} malformed records left out" in found.summary()
    assert len(found.left_out()) == len(BAD)
    with pytest.raises(RecordError, match=f"{len(BAD)} of {2 * len(BAD) + 1} records are malformed"):
        dataset(dirty, tokenizer, 0.4)


def test_bad_records_are_left_out_of_the_media_by_line(dirty: Path) -> None:
    """Encoding needs the id and the clip only, so it takes records whose other fields are wrong."""
    found = list_media(dirty, ["stage2"])
    file = dirty / "stage2/pite_143k.jsonl"
    lines = [int(sentence.removeprefix(f"{file}:").partition(":")[0]) for sentence in found.malformed]
    names = {line: name for line, name in enumerate(BAD, 2)}
    taken = [name for line, name in names.items() if line not in lines]
    assert taken == ["a number of 400 digits", "a number as text"] and lines == sorted(lines)


def test_repeated_records_are_counted_and_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Several conversations about one clip are no repeats. A last line may lack its end."""
    other = changed(PITE, "conversations.0.value", "<video>\nAnd then?")
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2/pite_143k.jsonl").write_text(
        "\n".join(map(json.dumps, (PITE, other, {**PITE, "id": "b"}, PITE)))
    )
    found = dataset(tmp_path, tokenizer, 0.0)
    assert len(found) == 4 and [(m.line, m.reason) for m in found.repeats] == [(4, "repeats an earlier record")]
    assert found.summary().endswith("1 records that repeat an earlier one, the first at pite_143k.jsonl:4")
    (tmp_path / "stage2/pite_143k.jsonl").write_text("\n".join(map(json.dumps, (PITE, other))))
    assert not dataset(tmp_path, tokenizer, 0.0).repeats
