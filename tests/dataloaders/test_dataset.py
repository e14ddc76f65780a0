"""A stage's training set: what is in it, what changes its fingerprint, and what malformed records are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dataloaders.dataset import StageDataset
from dataloaders.records import RecordError
from tests.records import INSTRUCT, PITE, VALLEY, changed


def pite(number: int) -> dict[str, Any]:
    return changed(PITE, "id", f"v{number}")


def write(data: Path, records: list[dict[str, Any] | str]) -> Path:
    """A stage 2 of these records, or of these lines."""
    (data / "stage2").mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (data / "stage2/pite_143k.jsonl").write_text("".join(line + "\n" for line in lines))
    return data


def stage2(data: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> StageDataset:
    settings = {"num_frames": 8, "num_points": 2, "max_length": 2048, "available": None, **options}
    return StageDataset(data, 2, tokenizer, **settings)


def test_samples_are_read_on_demand(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = stage2(write(tmp_path, [pite(i) for i in range(5)]), tokenizer)
    assert dataset.ids == [f"v{i}" for i in range(5)] and len(dataset) == 5
    for i in range(5):
        sample = dataset[i]
        assert (sample.id, sample.media) == (f"v{i}", f"stage2/v{i}")
        assert (len(sample.token_ids), len(sample.target_positions), sample.num_coordinates) == (
            dataset.tokens[i],
            dataset.targets[i],
            dataset.coordinates[i],
        )


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    long = changed(pite(1), "conversations.3.value", "The <b>circle</b> " + "is left " * 200)
    data = write(tmp_path, [pite(0), long, pite(2)])
    dataset = stage2(data, tokenizer, max_length=400, available={"stage2/v0", "stage2/v1"})
    assert (dataset.ids, dataset.over_length, dataset.not_encoded) == (["v0"], ["v1"], ["stage2/v2"])
    with pytest.raises(ValueError, match="holds no usable sample: 0 samples, 3 left out whose media"):
        stage2(data, tokenizer, available=())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("conversations.3.value", "The <b>circle</b> is LEFT."),
        ("conversations.0.value", "<video>\nDescribe the video in detail!"),
        ("trajectories.0.points.0.0", [0.0, 0.25]),
        ("id", "w1"),
    ],
)
def test_fingerprint_covers_contents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, path: str, value: object
) -> None:
    before = stage2(write(tmp_path, [pite(0), pite(1)]), tokenizer)
    same = stage2(tmp_path, tokenizer)
    assert before.fingerprint() == same.fingerprint() == before.fingerprint()
    after = stage2(write(tmp_path, [pite(0), changed(pite(1), path, value)]), tokenizer)
    assert after.fingerprint() != before.fingerprint()


def test_fingerprint_is_that_of_the_samples_in_use(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    both = stage2(write(tmp_path, [pite(0), pite(1)]), tokenizer)
    one = stage2(tmp_path, tokenizer, available={"stage2/v0"})
    alone = stage2(write(tmp_path, [pite(0)]), tokenizer)
    assert one.fingerprint() == alone.fingerprint() != both.fingerprint()


class TestMalformedRecords:
    def refused(self, data: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        with pytest.raises(RecordError) as caught:
            stage2(data, tokenizer)
        return str(caught.value).split("\n")

    def test_one(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        data = write(tmp_path, [pite(0), changed(pite(1), "meta.duration", 0), pite(2)])
        (line,) = self.refused(data, tokenizer)
        assert line.startswith(f"{data / 'stage2/pite_143k.jsonl'}:2: field 'duration' must be positive")

    def test_all_kinds_at_once(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        data = write(tmp_path, ["{", pite(1), changed(pite(2), "meta", ...), "[1]", pite(4)])
        places = [line.partition("jsonl:")[2] for line in self.refused(data, tokenizer)]
        assert [place[:3] for place in places] == ["1: ", "3: ", "4: "]
        assert "not valid JSON" in places[0] and "'meta' is missing" in places[1] and "not list" in places[2]

    def test_the_first_ten(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        data = write(tmp_path, [pite(0), *[changed(pite(i), "id", "") for i in range(1, 25)]])
        lines = self.refused(data, tokenizer)
        assert [int(line.partition("jsonl:")[2].partition(":")[0]) for line in lines] == list(range(2, 12))

    def test_over_all_files_of_a_stage(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """A file that ends too early is one error, and the next file is read all the same."""
        stage = tmp_path / "stage3"
        stage.mkdir()
        (stage / "valley.json").write_text(json.dumps([changed(VALLEY, "v_id", ""), VALLEY])[:-1])
        (stage / "video_instruct.json").write_text(json.dumps([INSTRUCT, changed(INSTRUCT, "a", "")]))
        with pytest.raises(RecordError) as caught:
            StageDataset(tmp_path, 3, tokenizer, num_frames=8, num_points=2, max_length=2048, available=None)
        first, second, third = str(caught.value).split("\n")
        assert "cannot name a media file" in first and "was it cut off?" in second and "the answer is empty" in third
