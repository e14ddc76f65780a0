"""What can be annotated: InternVid's lists of clips, records in VTimeLLM's form, and questions for times."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataloaders.annotation import steps
from dataloaders.annotation.__main__ import main
from dataloaders.annotation.pipeline import Video
from dataloaders.annotation.record import WHEN_QUESTIONS, pite_record, with_trajectories
from dataloaders.annotation.sources import read_captions, read_records
from dataloaders.annotation.steps import Phrase
from dataloaders.failures import Failure
from dataloaders.formats import read_pite
from dataloaders.formats.activitynet import Event, EventVideo
from dataloaders.media import list_media
from dataloaders.synthetic.render import write_mp4
from tests.dataloaders.formats.test_vtimellm import DENSE, MANY, NO_MARKS, RECORDS, TAG_LAST, WHAT, WHEN
from tests.records import changed

SOURCE = "Ptf_2VRj-V0"
INTERNVID = {
    "YoutubeID": SOURCE,
    "Start_timestamp": "00:00:02.000",
    "End_timestamp": "00:00:04.500",
    "Caption": "A red ball rolls to the right.",
    "Aesthetic_Score": 4.29,
    "UMT_Score": 0.43,
}


def videos_of(found: list[Video | Failure]) -> list[Video]:
    assert all(isinstance(each, Video) for each in found)
    return [each for each in found if isinstance(each, Video)]


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_internvids_clips_are_cut_from_their_sources(tmp_path: Path) -> None:
    (tmp_path / f"{SOURCE}.webm").touch()
    (tmp_path / f"{SOURCE}_70.000_75.500.mp4").touch()
    other = {**INTERNVID, "Start_timestamp": "00:01:10.000", "End_timestamp": "1:15.5"}
    gone = {**INTERNVID, "YoutubeID": "abcdefghijk", "Start_timestamp": 1, "End_timestamp": 2.25}
    first, cut, absent = videos_of(list(read_captions(lines(tmp_path / "i.jsonl", [INTERNVID, other, gone]), tmp_path)))
    assert first.name == f"{SOURCE}_2.000_4.500" and first.source == "internvid"
    assert (first.path.name, first.media.clip) == (f"{SOURCE}.webm", (2.0, 4.5))
    assert first.captions.duration == 2.5 and first.captions.events == (Event(0.0, 2.5, INTERNVID["Caption"]),)
    assert (cut.path.name, cut.media.clip) == (f"{SOURCE}_70.000_75.500.mp4", None), "a file of the clip is whole"
    assert absent.path == tmp_path / "abcdefghijk_1.000_2.250.mp4"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("Start_timestamp", "soon", "field 'Start_timestamp' must be a time such as 00:01:23.400, not 'soon'"),
        ("Start_timestamp", "00:00:09", "'End_timestamp': 4.5 s is not after 'Start_timestamp', 9 s"),
        ("YoutubeID", "short", "'YoutubeID' must be the 11 characters"),
        ("YoutubeID", "../../x", "cannot name a media file"),
        ("Caption", "", "'Caption' is empty"),
        ("Caption", ..., "'Caption' is missing"),
    ],
)
def test_one_bad_clip_is_one_failure(tmp_path: Path, name: str, value: object, reason: str) -> None:
    file = lines(tmp_path / "i.jsonl", [changed(INTERNVID, name, value), INTERNVID, INTERNVID])
    bad, good, twice = read_captions(file, tmp_path)
    assert isinstance(bad, Failure) and isinstance(good, Video) and isinstance(twice, Failure)
    assert bad.reason.startswith(f"{file}:1: ") and reason in bad.reason
    assert twice.reason.startswith(f"{file}:3: duplicate id")


def test_a_line_that_is_not_json_is_one_failure(tmp_path: Path) -> None:
    file = tmp_path / "i.jsonl"
    file.write_text(f'{{"Caption": "\\ud83d"}}\nnull\n{json.dumps(INTERNVID)}\n')
    half, null, good = read_captions(file, tmp_path)
    assert isinstance(half, Failure) and f"{file}:1: field 'Caption': \\ud83d is half" in half.reason
    assert isinstance(null, Failure) and "expected a JSON object" in null.reason and isinstance(good, Video)


def test_events_of_records(tmp_path: Path) -> None:
    found = videos_of(list(read_records(lines(tmp_path / "stage2.json", RECORDS), tmp_path)))
    assert [video.name for video in found] == [record["id"] for record in RECORDS]
    events = {video.name: video.captions.events for video in found}
    assert events[DENSE["id"]] == (
        Event(0.0, 9.4, "a man opens a door."),
        Event(12.0, 54.2, "he walks a dog."),
    )
    assert events[WHAT["id"]] == (Event(10.0, 20.0, "A kettle boils on a stove."),), "the question has the marks"
    assert events[WHEN["id"]] == events[NO_MARKS["id"]] == events[TAG_LAST["id"]] == ()
    assert events[MANY["id"]] == (Event(0.0, 30.0, "Two women cook."), Event(31.0, 99.96, "They eat, and one leaves"))
    for video in found:
        assert video.record is not None
        for event, (turn, offset) in zip(video.captions.events, video.record.spots):
            answer = video.record.record["conversations"][2 * turn + 1]["value"]
            assert answer[offset:].startswith(event.sentence)
    assert found[0].media.clip == (129.8, 184.0)


@pytest.mark.parametrize(
    ("answer", "sentences"),
    [
        ("A dog runs, from <s0> to <e0>. Then it eats, from <s1> to <e1>.", ["A dog runs", "Then it eats"]),
        ("It is 1.5 m long. Between <s0> and <e0> it bends!", ["it bends!"]),
        ("<s0> to <e0>, a cat.</s>", ["a cat."]),
        ("In the clip (from <s0> to <e0>) a cat is seen", ["a cat is seen"]),
        ("From <s0> to <e1>, nothing matches.", []),
    ],
)
def test_sentences_with_marks(tmp_path: Path, answer: str, sentences: list[str]) -> None:
    record = changed(DENSE, "conversations.1.value", answer)
    (video,) = videos_of(list(read_records(lines(tmp_path / "r.json", [record]), tmp_path)))
    assert [event.sentence for event in video.captions.events] == sentences


def test_records_of_one_clip_and_of_two(tmp_path: Path) -> None:
    other = changed(DENSE, "meta.split", [0.0, 54.2])
    file = lines(tmp_path / "r.json", [DENSE, DENSE, other])
    first, second, third = read_records(file, tmp_path)
    assert isinstance(first, Video) and isinstance(second, Video) and second.name == f"{DENSE['id']}.2"
    assert isinstance(third, Failure) and third.reason.startswith(f"{file}:3: '")
    assert "give each file or clip an id of its own" in third.reason


def test_trajectories_are_added_and_the_conversation_is_kept(tmp_path: Path) -> None:
    (video,) = videos_of(list(read_records(lines(tmp_path / "r.json", [DENSE]), tmp_path)))
    phrases = [[Phrase("a man", 0), Phrase("a door", 12)], [Phrase("a dog.", 9)]]
    points = {key: np.full((3, 2, 2), 0.5) for key in ((0, 1), (1, 0))}
    assert video.record is not None
    record = with_trajectories(video.record, video.captions, phrases, points)
    assert {**record, "trajectories": None} == {**DENSE, "trajectories": None}
    assert [(t["turn"], t["phrase"], t["times"]) for t in record["trajectories"]] == [
        (0, "a door", [0.0, 9.4]),
        (0, "a dog", [12.0, 54.2]),
    ]
    (turn,) = read_pite(record, "", tmp_path, num_frames=100, num_points=3).turns
    assert [turn.answer[m.start : m.end] for m in turn.mentions] == ["a door", "a dog"]
    when_turn = with_trajectories(video.record, video.captions, phrases, points, when_question=True)
    assert (
        when_turn["conversations"][:2] == DENSE["conversations"] and when_turn["trajectories"] == record["trajectories"]
    )
    assert read_pite(when_turn, "", tmp_path, num_frames=100, num_points=3).turns[1].answer in (
        "From 00 to 17.",
        "From 22 to 99.",
    )
    (when,) = videos_of(list(read_records(lines(tmp_path / "r.json", [MANY]), tmp_path)))
    assert when.record is not None
    kept = with_trajectories(when.record, when.captions, [[], []], {}, when_question=True)
    assert kept["conversations"] == MANY["conversations"], "it has such a question"


def test_questions_for_times() -> None:
    events = (Event(0.0, 2.0, "The dog barks."), Event(3.0, 9.0, "It sleeps."), Event(4.0, 5.0, "It sleeps."))
    video, phrases = EventVideo("x", "x", 10.0, events), [[Phrase("The dog", 0)], [], []]
    points = {(0, 0): np.full((1, 2, 2), 0.5)}
    orders = set()
    for number in range(16):
        record = pite_record(f"v{number}", "s", video, phrases, points, when_question=True)
        turns = read_pite(record, "", Path("s"), num_frames=100, num_points=1).turns
        (when_turn,) = [i for i, turn in enumerate(turns) if turn.answer == "From 00 to 20."]
        assert turns[when_turn].question in [form.format("the dog barks") for form in WHEN_QUESTIONS], (
            "the only single one"
        )
        (mention,) = turns[1 - when_turn].mentions
        assert turns[1 - when_turn].answer[mention.start : mention.end].lower() == "the dog"
        assert record["conversations"][0]["value"].startswith("<video>\n")
        orders.add(when_turn)
        assert len(pite_record(f"v{number}", "s", video, phrases, points)["conversations"]) == 2
    assert orders == {0, 1}
    whole = EventVideo("x", "x", 10.0, (Event(0.0, 9.9, "All."),))
    assert len(pite_record("v", "s", whole, [[]], {}, when_question=True)["conversations"]) == 2


@pytest.mark.parametrize("form", ["internvid", "records"])
def test_a_clip_is_annotated_inside_its_source(tmp_path: Path, form: str) -> None:
    """A textured square stands in the source's first 2 s and moves to the right in the clip."""
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-contrib-python-headless")
    rng = np.random.default_rng(0)
    thing = rng.integers(0, 256, (12, 12, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.full((60, 96, 192, 3), 90, np.uint8)
    left = [10] * 20 + [10 + 3 * i for i in range(25)] + [140] * 15
    for frame, x in zip(frames, left):
        frame[20:68, x : x + 48] = thing
    videos = tmp_path / "stage2/videos"
    videos.mkdir(parents=True)
    write_mp4(videos / f"{SOURCE}.mp4", frames)  # 10 frames a second
    if form == "internvid":
        name, flag = f"{SOURCE}_2.000_4.500", "--captions"
        file = lines(tmp_path / "i.jsonl", [INTERNVID])
    else:
        name, flag = SOURCE, "--records"
        meta = {"split": [2.0, 4.5], "duration": 2.5, "token": {"<s0>": 0.0, "<e0>": 2.5}}
        file = lines(tmp_path / "r.json", [{**DENSE, "id": SOURCE, "meta": meta}])
        record = json.loads(file.read_text())
        record["conversations"][1]["value"] = "From <s0> to <e0>, a red ball rolls."
        lines(file, [record])
    output = tmp_path / "stage2/pite_143k.jsonl"
    work = output.with_suffix(".steps")
    sentence = INTERNVID["Caption"] if form == "internvid" else "a red ball rolls."
    phrase = {"phrase": sentence[:10], "start": 0}
    steps.write_json(steps.step_path(work, "phrases", name), {"events": [{"sentence": sentence, "phrases": [phrase]}]})
    mask = np.zeros((96, 192), bool)
    mask[24:64, 14:54] = True
    steps.write_masks(steps.step_path(work, "masks", name), [[mask]])
    given = [flag, str(file), "--videos", str(videos), "--output", str(output), "--workers", "0", "--num-frames", "25"]
    assert main(given) == 0
    (made,) = (json.loads(line) for line in output.read_text().splitlines())
    (trajectory,) = made["trajectories"]
    points = np.array(trajectory["points"])
    assert points.shape == (3, 25, 2) and trajectory["phrase"].lower() == "a red ball"
    moved = (points[:, :, 0] - points[:, :1, 0]) * 192
    assert moved == pytest.approx(np.tile(3 * np.arange(25), (3, 1)), abs=1.0)
    (media,) = list_media(tmp_path, ["stage2"]).media
    assert (media.path.name, media.clip) == (f"{SOURCE}.mp4", (2.0, 4.5)), "training cuts the same clip"
