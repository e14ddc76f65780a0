"""Readers of the five data sets: the sample of a good record, and the error of a malformed one."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.formats import (
    SPLITS,
    Event,
    Record,
    Where,
    present_formats,
    present_splits,
    read_activitynet,
    read_narrative,
    read_pite,
    read_valley,
    read_video_instruct,
)
from dataloaders.formats.activitynet import activitynet_media
from dataloaders.formats.fields import find_name, names_in
from dataloaders.formats.instructions import valley_media, video_instruct_media
from dataloaders.formats.pite_143k import pite_media
from dataloaders.records import ABSENT, Media, RecordError
from tests.records import CAPTIONS, INSTRUCT, NARRATIVE, PITE, VALLEY, changed

WHERE = "records.jsonl:7"
FOLDER = Path("data/stage2")


class TestPiTe143k:
    def read(self, record: dict[str, Any], **options: int) -> Any:
        return read_pite(record, WHERE, FOLDER, **{"num_frames": 100, "num_points": 2, **options})

    def test_text(self) -> None:
        sample = self.read(PITE)
        assert (sample.id, sample.media) == ("v000001", "stage2/v000001")
        first, second = sample.turns
        assert first.question == "Describe the video in detail."
        assert first.answer == "From 00 to 17, a red circle moves right. From 22 to 99, a cat."
        assert (second.question, second.answer) == ("Where is it?", "The <b>circle</b> is left.")

    def test_offsets_are_carried_through(self) -> None:
        for turn, phrases in zip(self.read(PITE).turns, [["a red circle", "a cat"], ["<b>circle</b>"]]):
            assert [turn.answer[m.start : m.end] for m in turn.mentions] == phrases

    @pytest.mark.parametrize("seed", range(10))
    def test_offsets_of_every_word(self, seed: int) -> None:
        """The offset of any word of any answer is right after the marks have changed their length."""
        rng = np.random.default_rng(seed)
        words = [f"w{i}" for i in range(12)]
        marks = {f"<{kind}{i}>": 54.2 * (kind == "e") for i in range(6) for kind in "se"}
        pieces = [*words, *marks, "</s>", "</s>"]
        text = " ".join(pieces[i] for i in rng.permutation(len(pieces)))
        trajectories = [
            {"turn": 0, "phrase": w, "start": text.index(w), "times": [0, 1], "points": [[[0.5, 0.5]]]} for w in words
        ]
        # "w1" also begins "w10" and "w11".
        for t in trajectories:
            t["start"] = f"{text} ".index(f"{t['phrase']} ")
        record = {**PITE, "trajectories": trajectories}
        record["conversations"] = [PITE["conversations"][0], {"from": "gpt", "value": text}]
        record["meta"] = {"duration": 54.2, "token": marks}
        (turn,) = self.read(record, num_points=1).turns
        assert [turn.answer[m.start : m.end] for m in turn.mentions] == words
        assert "<" not in turn.answer and turn.answer == turn.answer.strip()

    def test_trajectory(self) -> None:
        red, cat = self.read(PITE, num_frames=5).turns[0].mentions
        assert red.trajectory.shape == (2, 5, 2), "num_points points"
        np.testing.assert_allclose(red.trajectory[0], [[x, 0.5] for x in (0, 0.25, 0.5, 0.75, 1)])
        assert (red.trajectory[1, 3:] == ABSENT).all() and (red.trajectory[1, :3] == 0.25).all()
        # Frames are at 0, 13.55, ...: one of them is between 12 and 20 s.
        assert (cat.trajectory[0, :, 0] == [-1, 0.5, -1, -1, -1]).all()

    def test_indices_follow_the_number_of_frames(self) -> None:
        assert self.read(PITE, num_frames=32).turns[0].answer.startswith("From 00 to 06, a red circle")

    def test_media(self) -> None:
        path = FOLDER / "videos/v000001.mp4"
        assert pite_media(PITE, WHERE, FOLDER) == Media("stage2/v000001", path, clip=(129.8, 184.0))
        for whole in (None, ...):
            assert pite_media(changed(PITE, "meta.split", whole), WHERE, FOLDER).clip is None

    def test_trajectories_are_optional(self) -> None:
        for none in (None, ..., []):
            sample = self.read(changed(PITE, "trajectories", none))
            assert [t.mentions for t in sample.turns] == [(), ()]

    def test_small_overshoot_is_clipped(self) -> None:
        record = changed(PITE, "meta.token.<e1>", 54.25)
        assert self.read(record).turns[0].answer == self.read(PITE).turns[0].answer

    @pytest.mark.parametrize(
        ("path", "value", "reason"),
        [
            ("meta", ..., "field 'meta' is missing"),
            ("meta.duration", 0, "field 'duration' must be positive"),
            ("meta.duration", "54", "field 'duration' must be int or float, not str"),
            ("meta.duration", math.nan, "field 'duration' must be a finite number"),
            ("meta.split", [184.0, 129.8], "'meta.split': start 184.0 s comes after end 129.8 s"),
            ("meta.split", [1], "'meta.split' must be [start, end]"),
            ("meta.token.<e0>", 60, "'meta.token.<e0>': 60 s is outside the video's 0 to 54.2 s"),
            ("meta.token.<s0>", -1, "'meta.token.<s0>': -1 s is outside"),
            ("meta.token.<s0>", math.nan, "'meta.token.<s0>' must be a finite number"),
            ("meta.token.<s0>", 20.0, "'meta.token.<s0>': start 20.0 s comes after end 9.4 s"),
            ("meta.token.<s1>", ..., "'conversations[1]': mark <s1> has no time"),
            ("id", "", "cannot name a media file"),
            ("id", "/abs", "cannot name a media file"),
            ("conversations", [], "'conversations' must hold pairs"),
            ("conversations.3", ..., "'conversations' must hold pairs"),
            ("conversations.1.from", "human", "'conversations[1].from' must be 'gpt', not 'human'"),
            ("conversations.1.value", None, "'conversations[1]' must hold"),
            ("conversations.1.value", " </s> ", "'conversations[1]': the answer is empty"),
            ("conversations.0.value", "see <video> here", "'conversations[0]': a media tag may be at"),
            ("trajectories.0", 3, "'trajectories[0]' must be an object"),
            ("trajectories.0.turn", 2, "'trajectories[0].turn' is 2, but there are 2 answers"),
            ("trajectories.0.turn", -1, "'trajectories[0].turn' is -1"),
            (
                "trajectories.0.phrase",
                "a blue circle",
                "trajectories[0]: phrase 'a blue circle' is not at character 20",
            ),
            ("trajectories.0.start", 21, "trajectories[0]: phrase 'a red circle' is not at character 21"),
            ("trajectories.0.start", -58, "is not at character -58"),
            ("trajectories.0.phrase", "", "phrase '' is not at"),
            ("trajectories.0.times", [0, 60], "phrase 'a red circle': field 'times': 60 s is outside"),
            ("trajectories.0.times", [5, 2], "field 'times': start 5.0 s comes after end 2.0 s"),
            ("trajectories.0.points.0.1", [0.5, math.nan], "phrase 'a red circle': points[0][1] = [0.5, nan] is not a"),
            ("trajectories.0.points.1.0", [0.5, 1.5], "points[1][0] = [0.5, 1.5] is outside the frame"),
            ("trajectories.0.points.1.0", [-1, 0.5], "points[1][0] = [-1, 0.5] is half absent"),
            ("trajectories.0.points", [[[0.5, 0.5]]], "1 tracks where 2 are needed"),
            ("trajectories.0.points.0", [[0.5, 0.5]], "equally many"),
        ],
    )
    def test_refusals(self, path: str, value: Any, reason: str) -> None:
        with pytest.raises(RecordError) as caught:
            self.read(changed(PITE, path, value))
        assert str(caught.value).startswith(f"{WHERE}: ") and reason in str(caught.value)


class TestInstructions:
    def test_valley(self) -> None:
        sample = read_valley(VALLEY, WHERE, Path("d/stage3"))
        assert (sample.id, sample.media) == ("v_001", "stage3/v_001")
        assert [(t.question, t.answer) for t in sample.turns] == [("What happens?", "A dog runs.")]
        last = read_valley(VALLEY, WHERE, Path("d/stage3"), turn="last")
        assert [(t.question, t.answer) for t in last.turns] == [("Why?", "It is late.")]

    def test_valley_names_its_video_in_two_ways(self) -> None:
        expected = Media("stage3/v_001", Path("d/stage3/videos/v_001.mp4"))
        assert valley_media(VALLEY, WHERE, Path("d/stage3")) == expected
        for name in ("v_001", "v_001.mp4"):
            record = {"video": name, "conversations": VALLEY["conversations"]}
            assert valley_media(record, WHERE, Path("d/stage3")) == expected

    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ({"v_id": None, "video": "v_001.mp4"}, "v_001"),
            ({"v_id": "", "video": None, "id": 7}, "7"),
            ({"source": "jukinmedia", "v_id": "1062342", "video": "Dog vs. Cat #2.mp4"}, "Dog vs. Cat #2"),
            ({"source": "vatex", "v_id": "Ptf_2VRj-V0_000122_000132", "video": "x.mp4"}, "Ptf_2VRj-V0_000122_000132"),
            ({"source": "jukinmedia", "v_id": "1062342", "video": None}, "1062342"),
        ],
    )
    def test_the_field_that_names_a_valley_video(self, fields: dict[str, Any], name: str) -> None:
        media = valley_media({**fields, "conversations": VALLEY["conversations"]}, WHERE, Path("d/stage3"))
        assert media == Media(f"stage3/{name}", Path(f"d/stage3/videos/{name}.mp4"))

    def test_any_turn_is_the_same_in_every_run(self) -> None:
        def chosen(number: int) -> str:
            record = changed(VALLEY, "conversations.1.value", f"Answer {number}.")
            return read_valley(record, WHERE, FOLDER, turn="any").turns[0].answer

        answers = [chosen(i) for i in range(40)]
        assert answers == [chosen(i) for i in range(40)]
        assert 8 < answers.count("It is late.") < 32
        dirty = changed(VALLEY, "conversations.3.value", "")
        assert read_valley(dirty, WHERE, FOLDER).turns[0].answer == "A dog runs."
        with pytest.raises(RecordError, match=r"'conversations\[3\]': the answer is empty"):
            read_valley(dirty, WHERE, FOLDER, turn="last")

    def test_videos_are_found_with_any_suffix(self, tmp_path: Path) -> None:
        def found(name: str) -> str:
            path = tmp_path / f"{name}.mp4"
            return str(path.with_name(find_name(path.name, names_in(path.parent))).relative_to(tmp_path))

        for name in ("v_001.mkv", "v_2.x.webm", "v_2.x.mp4", "sub/v_3.avi"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        names = [found(name) for name in ("v_001", "v_2.x", "sub/v_3", "v_4", "none/v_5")]
        assert names == ["v_001.mkv", "v_2.x.mp4", "sub/v_3.avi", "v_4.mp4", "none/v_5.mp4"]
        (tmp_path / "v_001.mp4").touch()
        assert found("v_001") == "v_001.mp4", "a folder that changed is listed again"

    def test_videos_are_found_in_another_case_or_form(self) -> None:
        decomposed = unicodedata.normalize("NFD", "café.mp4")
        names = frozenset({"UPPER.MP4", "Clip.WMV", decomposed, "one.MP4", "ONE.mp4", "two.mkv", "Two.MKV"})
        assert find_name("upper.mp4", names) == "UPPER.MP4"
        assert find_name("clip.mp4", names) == "Clip.WMV"
        assert find_name("café.mp4", names) == decomposed != "café.mp4"
        assert find_name("one.mp4", names) == "one.mp4", "two files could be meant"
        assert find_name("two.mp4", names) == "two.mkv", "the exact case comes first"
        assert find_name("three.mp4", names) == "three.mp4"

    def test_video_instruct(self) -> None:
        sample = read_video_instruct(INSTRUCT, WHERE, Path("d/stage3"))
        assert sample.media == "stage3/v_k_ZXmr8pmrs"
        assert [(t.question, t.answer) for t in sample.turns] == [("What is it about?", "A cat.")]
        path = Path("d/stage3/videos/v_k_ZXmr8pmrs.mp4")
        assert video_instruct_media(INSTRUCT, WHERE, Path("d/stage3")) == Media(sample.media, path)

    @pytest.mark.parametrize("tag", ["<video>\n", "<image>\n", " <video> "])
    def test_tags(self, tag: str) -> None:
        for text in (f"{tag}What?", f"What?{tag}", "What?"):
            assert read_video_instruct({**INSTRUCT, "q": text}, WHERE, FOLDER).turns[0].question == "What?"

    @pytest.mark.parametrize(
        ("path", "value", "reason"),
        [
            ("v_id", ..., "field 'v_id' is missing"),
            ("v_id", ["a"], "field 'v_id' must be str or int, not list"),
            ("conversations.1.value", "</s>", "'conversations[1]': the answer is empty"),
            ("conversations.0.value", "<video>", "'conversations[0]': the question is empty"),
            ("conversations.0.from", "gpt", "'conversations[0].from' must be 'human'"),
        ],
    )
    def test_valley_refusals(self, path: str, value: Any, reason: str) -> None:
        with pytest.raises(RecordError) as caught:
            read_valley(changed(VALLEY, path, value), WHERE, FOLDER)
        assert str(caught.value).startswith(f"{WHERE}: ") and reason in str(caught.value)

    @pytest.mark.parametrize(
        ("path", "value", "reason"),
        [
            ("a", "", "'a': the answer is empty"),
            ("q", " ", "'q': the question is empty"),
            ("q", "is <video> it", "'q': a media tag may be at"),
            ("video_id", ..., "'video_id' is missing"),
            ("video_id", True, "'video_id' must be str or int, not bool"),
        ],
    )
    def test_video_instruct_refusals(self, path: str, value: Any, reason: str) -> None:
        with pytest.raises(RecordError) as caught:
            read_video_instruct(changed(INSTRUCT, path, value), WHERE, FOLDER)
        assert str(caught.value).startswith(f"{WHERE}: ") and reason in str(caught.value)


class TestActivityNet:
    def test_events(self) -> None:
        video = read_activitynet(CAPTIONS, WHERE, Path("d/evaluation"))
        assert (video.id, video.media, video.duration) == ("v_1", "evaluation/v_1", 82.73)
        assert video.events == (
            Event(0.83, 19.86, "A young woman is seen."),
            Event(17.37, 82.73, "The girl dances."),
        ), "the real file rounds ends past the duration"
        path = Path("d/evaluation/videos/v_1.mp4")
        assert activitynet_media(CAPTIONS, WHERE, Path("d/evaluation")) == Media("evaluation/v_1", path)

    @pytest.mark.parametrize(
        ("path", "value", "reason"),
        [
            ("timestamps.0", [5, 90], "'timestamps[0]': 90 s is outside the video's 0 to 82.73 s"),
            ("timestamps.0", [5, 4], "'timestamps[0]': start 5.0 s comes after"),
            ("timestamps", [], "0 'timestamps' for 2 'sentences'"),
            ("sentences.1", "", "'sentences[1]' must be a sentence"),
            ("duration", -1, "'duration': -1 s is outside"),
        ],
    )
    def test_refusals(self, path: str, value: Any, reason: str) -> None:
        with pytest.raises(RecordError) as caught:
            read_activitynet(changed(CAPTIONS, path, value), WHERE, FOLDER)
        assert str(caught.value).startswith(f"{WHERE}: ") and reason in str(caught.value)


class TestDataFolder:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        for split in ("stage1", "stage2", "stage3", "evaluation"):
            (tmp_path / split).mkdir()
        (tmp_path / "stage1/localized_narratives.jsonl").write_text(json.dumps(NARRATIVE) + "\n")
        (tmp_path / "stage2/pite_143k.jsonl").write_text(json.dumps(PITE) + "\n")
        valley = [VALLEY, VALLEY]
        (tmp_path / "stage3/valley.json").write_text(json.dumps(valley))
        captions = {"v_1": {k: v for k, v in CAPTIONS.items() if k != "id"}}
        (tmp_path / "evaluation/activitynet_captions.json").write_text(json.dumps(captions))
        return tmp_path

    def test_a_missing_format_is_skipped(self, data: Path) -> None:
        assert [f.file for f in present_formats(data, "stage3")] == ["valley.json"]
        (data / "stage2/pite_143k.jsonl").unlink()
        assert present_splits(data) == ("stage1", "stage3", "evaluation")
        with pytest.raises(ValueError, match=r"stage2 holds none of pite_143k\.jsonl"):
            present_formats(data, "stage2")

    def test_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such data folder"):
            present_formats(tmp_path / "nothing", "stage1")
        with pytest.raises(ValueError, match="is no data folder: none of stage1, stage2, stage3, evaluation"):
            present_splits(tmp_path)
        assert set(SPLITS) == {"stage1", "stage2", "stage3", "evaluation"}

    def test_every_shard_of_the_narratives_is_read(self, data: Path) -> None:
        for i in range(2):
            name = f"coco_train_localized_narratives-{i:05d}-of-00002.jsonl"
            (data / "stage1" / name).write_text(json.dumps({**NARRATIVE, "image_id": str(i)}) + "\n")
        files = [f.file for f in present_formats(data, "stage1")]
        assert len(files) == 3 and files[1] == "coco_train_localized_narratives-00001-of-00002.jsonl"


class Unprintable(Where):
    """A place that must not be printed: counting lines for every record would read the file again each time."""

    def __str__(self) -> str:
        raise AssertionError("a good record's place was printed")


@pytest.mark.parametrize(
    ("read", "record", "options"),
    [
        (read_narrative, NARRATIVE, {}),
        (read_pite, PITE, {"num_frames": 100, "num_points": 2}),
        (read_valley, VALLEY, {}),
        (read_video_instruct, INSTRUCT, {}),
        (read_activitynet, CAPTIONS, {}),
    ],
)
def test_places_are_printed_in_messages_only(read: Callable[..., Any], record: Record, options: dict[str, int]) -> None:
    place = Unprintable(Path("records.jsonl"), 0)
    read(record, place, FOLDER, **options)
    with pytest.raises(AssertionError, match="place was printed"):
        read({}, place, FOLDER, **options)


def test_the_documented_record_is_read() -> None:
    """The example in docs/data.md: its offsets are right, and its marks, turns and points are read as documented."""
    text = (Path(__file__).parents[3] / "docs/data.md").read_text()
    record = json.loads(text.partition("```json\n")[2].partition("```")[0])
    sample = read_pite(record, WHERE, FOLDER, num_frames=100, num_points=3)
    first, second = sample.turns
    assert first.answer == "From 00 to 17, a red circle moves right. From 22 to 56, a blue square moves up."
    phrases = [[turn.answer[m.start : m.end] for m in turn.mentions] for turn in sample.turns]
    assert phrases == [["a red circle", "a blue square"], ["The blue square"]]
    red, blue = (m.trajectory for m in first.mentions)
    np.testing.assert_allclose(red[1, 0], [0.28, 0.44])
    assert (red[:, 18:] == ABSENT).all() and (blue[:, :21] == ABSENT).all() and (blue[:, 23:55] != ABSENT).all()
    np.testing.assert_allclose(blue[:, 23:55], second.mentions[0].trajectory[:, 23:55], atol=1e-6)
    assert pite_media(record, WHERE, FOLDER).clip == (129.8, 184.0)
