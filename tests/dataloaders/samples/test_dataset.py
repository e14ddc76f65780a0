"""A stage's training set: its samples, its fingerprint, and the errors of malformed records."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerBase

from dataloaders.failures import read_failures
from dataloaders.formats import read_pite
from dataloaders.records import RecordError
from dataloaders.samples.dataset import StageDataset
from dataloaders.samples.prompts import tokenize
from tests.records import INSTRUCT, PITE, VALLEY, changed
from tests.text import llama_like

PITE_TEXT = " From <s0> to <e0>, a red circle moves right. From <s1> to <e1>, a cat. </s> 🎈"


def pite(number: int) -> dict[str, Any]:
    return changed(PITE, "id", f"v{number}")


def write(data: Path, records: list[dict[str, Any] | str]) -> Path:
    """Write a stage 2 with these records or lines."""
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


def test_the_largest_token_is_that_of_the_samples_in_use(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = write(tmp_path, [pite(0), changed(pite(1), "conversations.0.value", PITE_TEXT), pite(2)])
    dataset = stage2(data, tokenizer)
    assert dataset.largest_tokens.tolist() == [dataset[i].token_ids.max() for i in range(3)]
    some = stage2(data, tokenizer, available={"stage2/v0", "stage2/v2"})
    assert some.largest_tokens.tolist() == [some[i].token_ids.max() for i in range(2)]


def test_samples_left_out_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
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


class TestIndex:
    """The tokenized samples on disk: the same numbers, made once, and made again after any change."""

    def assert_same(self, one: StageDataset, other: StageDataset) -> None:
        assert one.ids == other.ids and one.fingerprint() == other.fingerprint()
        for i in range(len(one)):
            for name, value in vars(one[i]).items():
                assert np.array_equal(value, getattr(other[i], name)), name
                assert type(value) is type(getattr(other[i], name))

    def test_samples_equal_those_of_the_tokenizer(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        records = [
            pite(0),
            changed(pite(1), "trajectories", None),
            changed(pite(2), "conversations.1.value", PITE_TEXT),
        ]
        dataset = stage2(write(tmp_path, records), tokenizer)
        for record, ours in zip(records, [dataset[i] for i in range(3)]):
            sample = read_pite(record, "here", tmp_path / "stage2", num_frames=8, num_points=2)
            for name, value in vars(tokenize(sample, tokenizer, num_frames=8, num_points=2)).items():
                kept = getattr(ours, name)
                assert np.array_equal(kept, value) and getattr(kept, "dtype", None) == getattr(value, "dtype", None)

    def test_made_once(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, cache = write(tmp_path, [pite(i) for i in range(5)]), tmp_path / "cache"
        alone, first = stage2(data, tokenizer), stage2(data, tokenizer, cache=cache)
        monkeypatch.setattr("dataloaders.samples.index.tokenize", None)
        second = stage2(data, tokenizer, cache=cache)
        self.assert_same(alone, first)
        self.assert_same(first, second)
        self.assert_same(first, pickle.loads(pickle.dumps(second)))
        (file,) = cache.iterdir()
        assert load_file(file)["token_ids"].dtype == np.int32, "plain safetensors"

    def test_with_processes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dataloaders.derived._CHUNK", 4)
        data = write(tmp_path, [pite(i) if i != 13 else changed(pite(i), "id", "") for i in range(30)])
        options = {"tokenizer": llama_like(), "failure_budget": 0.1}
        together = stage2(data, **options, processes=2)
        self.assert_same(stage2(data, **options), together)
        assert [m.line for m in together.malformed] == [14]

    @pytest.mark.parametrize("change", ["annotation", "num_frames", "num_points", "turn", "tokenizer", "code"])
    def test_made_again(self, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer, cache, options = llama_like("first"), tmp_path / "cache", {}
        data = write(tmp_path, [pite(i) for i in range(3)])
        stage2(data, tokenizer, cache=cache)
        if change == "annotation":
            write(data, [pite(0), pite(1), changed(pite(2), "trajectories.0.points.0.0", [0.0, 0.25])])
        elif change == "tokenizer":
            tokenizer = llama_like("always")
        elif change == "code":
            monkeypatch.setattr("dataloaders.samples.index._code", lambda: "another version")
        else:
            options = {change: {"num_frames": 6, "num_points": 1, "turn": "last"}[change]}
        made = stage2(data, tokenizer, cache=cache, **options)
        assert len(list(cache.iterdir())) == 2
        self.assert_same(made, stage2(data, tokenizer, **options))

    def test_another_length_or_store_needs_no_other_index(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        data, cache = write(tmp_path, [pite(i) for i in range(5)]), tmp_path / "cache"
        stage2(data, tokenizer, cache=cache)
        assert stage2(data, tokenizer, cache=cache, available={"stage2/v3"}).ids == ["v3"]
        with pytest.raises(ValueError, match="5 left out for more than 20 tokens"):
            stage2(data, tokenizer, cache=cache, max_length=20)
        assert len(list(cache.iterdir())) == 1

    def test_ranks_build_it_once(self, tmp_path: Path) -> None:
        """Of two processes that start together, one builds the file and the other waits and maps it."""
        data, cache = write(tmp_path, [pite(i) for i in range(200)]), tmp_path / "cache"
        code = (
            "import sys, pathlib; from tests.text import llama_like; "
            "from tests.dataloaders.samples.test_dataset import stage2; "
            "from dataloaders.samples import index; build = index._build; built = []; "
            "index._build = lambda *rest: (built.append(1), build(*rest)); "
            "d = stage2(pathlib.Path(sys.argv[1]), llama_like(), cache=pathlib.Path(sys.argv[2])); "
            "print(len(built), d.fingerprint())"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", code, str(data), str(cache)], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        outputs = [process.communicate(timeout=120)[0].split(maxsplit=1) for process in processes]
        assert sorted(built for built, _ in outputs) == ["0", "1"]
        assert outputs[0][1] == outputs[1][1]

    def test_killed_while_it_was_made(self, tmp_path: Path) -> None:
        """The next run makes the file and removes what the killed run left."""
        data, cache = write(tmp_path, [pite(i) for i in range(600)]), tmp_path / "cache"
        code = (
            "import sys, os, signal, pathlib; from tests.text import llama_like; "
            "from tests.dataloaders.samples.test_dataset import stage2; from dataloaders.samples import tokenized; "
            "pack, calls = tokenized.pack, []; "
            "tokenized.pack = lambda *rest: (calls.append(1), "
            "len(calls) == 2 and os.kill(os.getpid(), signal.SIGKILL), pack(*rest))[-1]; "
            "stage2(pathlib.Path(sys.argv[1]), llama_like(), cache=pathlib.Path(sys.argv[2]))"
        )
        killed = subprocess.run([sys.executable, "-c", code, str(data), str(cache)], capture_output=True)
        assert killed.returncode == -9, killed.stderr
        assert not list(cache.glob("*.safetensors")) and list(cache.glob(".*.tmp"))
        self.assert_same(stage2(data, llama_like(), cache=cache), stage2(data, llama_like()))
        assert [p.suffix for p in cache.iterdir()] == [".safetensors"]

    def test_without_a_single_good_record(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        data = write(tmp_path, [changed(pite(i), "id", "") for i in range(3)])
        with pytest.raises(ValueError, match="holds no usable sample: 0 samples, 3 malformed records left out"):
            stage2(data, tokenizer, failure_budget=1.0)

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_a_damaged_index_is_named(self, tmp_path: Path, keep: int, tokenizer: PreTrainedTokenizerBase) -> None:
        data, cache = write(tmp_path, [pite(0)]), tmp_path / "cache"
        stage2(data, tokenizer, cache=cache)
        (file,) = cache.iterdir()
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=f"{file} is damaged .*; remove it, and it will be made again"):
            stage2(data, tokenizer, cache=cache)


class TestBudget:
    def test_within(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        records = [pite(i) for i in range(10)]
        records[4] = changed(records[4], "meta.duration", 0)
        long = "The <b>circle</b> " + "is left " * 200
        records[6] = changed(records[6], "conversations.3.value", long)
        options = {"failure_budget": 0.1, "max_length": 400, "available": {f"stage2/v{i}" for i in range(9)}}
        dataset = stage2(write(tmp_path, records), tokenizer, **options)
        assert dataset.ids == ["v0", "v1", "v2", "v3", "v5", "v7", "v8"]
        assert dataset.summary().endswith("1 malformed records left out")
        read, tokenized, encode = dataset.left_out()
        assert (read.id, read.stage) == ("stage2/pite_143k.jsonl:5", "read") and "must be positive" in read.reason
        assert (tokenized.id, tokenized.stage) == (
            "stage2/v6",
            "tokenize",
        ) and "more than 400 tokens" in tokenized.reason
        assert (encode.id, encode.stage) == ("stage2/v9", "encode")
        dataset.write_left_out(tmp_path / "left_out.jsonl")
        assert list(read_failures(tmp_path / "left_out.jsonl")) == [read, tokenized, encode]
        exclusions = dataset.exclusions()
        assert {k: v for k, v in exclusions.items() if k != "which"} == {"encode": 1, "read": 1, "tokenize": 1}
        assert exclusions == stage2(tmp_path, tokenizer, **options).exclusions()
        other = stage2(tmp_path, tokenizer, **{**options, "available": {f"stage2/v{i}" for i in range(1, 10)}})
        assert other.exclusions() != exclusions

    def test_nothing_left_out(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        dataset = stage2(write(tmp_path, [pite(0)]), tokenizer)
        assert dataset.left_out() == [] and dataset.exclusions() == {}

    def test_dirty_instructions(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The kinds of malformed records in Valley and VideoInstruct100K, over both files."""
        stage = tmp_path / "stage3"
        stage.mkdir()
        valley = [changed(VALLEY, "v_id", f"a{i}") for i in range(6)]
        valley[1] = changed(valley[1], "conversations.1.value", " </s>")
        valley[2] = changed(valley[2], "conversations.0.value", "Look at <video> here")
        valley[3] = changed(valley[3], "conversations.0.value", "What? <video>")
        valley[4] = changed(valley[4], "conversations.0.from", "gpt")
        instruct = [{**INSTRUCT, "video_id": f"b{i}"} for i in range(3)]
        instruct[0]["a"] = ""
        (stage / "valley.json").write_text(json.dumps(valley, indent=1))
        (stage / "video_instruct.json").write_text(json.dumps(instruct, indent=1))
        options = {"num_frames": 8, "num_points": 2, "max_length": 2048, "available": None}
        dataset = StageDataset(tmp_path, 3, tokenizer, failure_budget=0.5, **options)
        assert dataset.ids == ["a0", "a3", "a5", "b1", "b2"]
        assert [m.file for m in dataset.malformed] == ["valley.json"] * 3 + ["video_instruct.json"]
        with pytest.raises(RecordError, match=r"4 of 9 records are malformed, more than the failure budget of 1\.00%"):
            StageDataset(tmp_path, 3, tokenizer, **options)


class TestMalformedRecords:
    def refused(self, data: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        with pytest.raises(RecordError) as caught:
            stage2(data, tokenizer)
        return str(caught.value).split("\n")

    def test_one(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        data = write(tmp_path, [pite(0), changed(pite(1), "meta.duration", 0), pite(2)])
        line, count = self.refused(data, tokenizer)
        assert (
            count
            == "1 of 3 records are malformed, more than the failure budget of 1.00%; add --failure-budget 0.34 or more to leave them out"
        )
        assert line.startswith(f"{data / 'stage2/pite_143k.jsonl'}:2: field 'duration' must be positive")

    def test_all_kinds_at_once(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        data = write(tmp_path, ["{", pite(1), changed(pite(2), "meta", ...), "[1]", pite(4)])
        places = [line.partition("jsonl:")[2] for line in self.refused(data, tokenizer)[:-1]]
        assert [place[:3] for place in places] == ["1: ", "3: ", "4: "]
        assert "not valid JSON" in places[0] and "'meta' is missing" in places[1] and "not list" in places[2]

    @pytest.mark.parametrize("path", ["conversations.0.value", "conversations.3.value", "id", "source"])
    def test_half_an_emoji(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
        """An escaped surrogate in any field: within the budget the record is left out; beyond it, it is an error."""
        data = write(tmp_path, [pite(0), changed(pite(1), path, "It is \ud83c"), pite(2)])
        line, _ = self.refused(data, tokenizer)
        assert line.startswith(f"{data / 'stage2/pite_143k.jsonl'}:2: field '")
        assert r"\ud83c is half of a surrogate pair" in line
        dataset = stage2(data, tokenizer, failure_budget=0.5)
        assert dataset.ids == ["v0", "v2"] and [m.line for m in dataset.malformed] == [2]

    def test_the_first_ten(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        data = write(tmp_path, [pite(0), *[changed(pite(i), "id", "") for i in range(1, 25)]])
        *lines, count = self.refused(data, tokenizer)
        assert count.startswith("24 of 25 records")
        assert [int(line.partition("jsonl:")[2].partition(":")[0]) for line in lines] == list(range(2, 12))

    def test_over_all_files_of_a_stage(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """A truncated file is one error, and the next file is still read."""
        stage = tmp_path / "stage3"
        stage.mkdir()
        (stage / "valley.json").write_text(json.dumps([changed(VALLEY, "v_id", ""), VALLEY])[:-1])
        (stage / "video_instruct.json").write_text(json.dumps([INSTRUCT, changed(INSTRUCT, "a", "")]))
        with pytest.raises(RecordError) as caught:
            StageDataset(tmp_path, 3, tokenizer, num_frames=8, num_points=2, max_length=2048, available=None)
        first, second, third = str(caught.value).split("\n")
        assert "cannot name a media file" in first and "the answer is empty" in second and "was it cut off?" in third
