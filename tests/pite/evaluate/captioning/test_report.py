"""The published dense captioning numbers, hand-computed cases, and what the strict protocol counts."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from pite.evaluate import captioning
from pite.evaluate.__main__ import main
from pite.evaluate.captioning import scores
from pite.evaluate.captioning.answers import Caption
from pite.evaluate.captioning.scores import NO_MATCH, Video, caption_scores
from tests.pite.evaluate.captioning.test_java import needs_java

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "evaluation"
DOG, CAT = "a dog runs along the beach", "two cats sleep indoors"


def run(folder: Path, answers: dict[str, str], truth: list[dict], *more: str) -> int:
    """Score captioning answers by video against one file for each annotator; returns the exit status."""
    files = [folder / f"val_{i + 1}.json" for i in range(len(truth))]
    for file, videos in zip(files, truth):
        file.write_text(json.dumps(videos))
    lines = [
        {"video_id": video, "task": "captioning", "query_id": 0, "answer": text} for video, text in answers.items()
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--predictions", f"{folder}/p.jsonl", "--ground-truth", *map(str, files), "--metrics", f"{folder}/m.json"]
    return main(["captioning", *argv, *more])


def numbers(folder: Path) -> dict[str, float]:
    return json.loads((folder / "m.json").read_text())["dense_captioning"]


def annotated(*events: tuple[str, float, float], duration: float = 100.0) -> dict:
    sentences, times = [event[0] for event in events], [event[1:] for event in events]
    return {"duration": duration, "timestamps": times, "sentences": sentences}


def answer(*events: tuple[str, int, int]) -> str:
    return json.dumps([{"event": e, "timestamps": f"from {start:02} to {end:02}"} for e, start, end in events])


@needs_java
@pytest.mark.usefixtures("shared_meteor")
@pytest.mark.parametrize("protocol", ["published", "strict"])
def test_the_golden_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str], protocol: str) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["dense_captioning"]
    files = ["--predictions", f"{GOLDEN}/predictions.jsonl", "--ground-truth", f"{GOLDEN}/ground_truth.json"]
    argv = ["captioning", *files, "--protocol", protocol, "--metrics", f"{tmp_path}/m.json"]
    assert main(argv) == 0
    printed = capfd.readouterr().out
    first = dict(line.split() for line in printed.splitlines()[:3])
    for name in ("soda_c", "METEOR", "CIDEr"):
        assert first[name] == f"{numbers(tmp_path)[name]:.2f}"
        published = numbers(tmp_path)[name] == pytest.approx(expected[name], abs=expected["tolerance"])
        assert published or (protocol == "strict" and name == "soda_c")
    if protocol == "strict":
        # METEOR is not symmetric, so the right way round gives another number.
        assert numbers(tmp_path)["soda_c"] < expected["soda_c"] - expected["tolerance"]
        before = numbers(tmp_path)
        assert main(argv) == 0 and numbers(tmp_path) == before and capfd.readouterr().out == printed


@needs_java
@pytest.mark.usefixtures("shared_meteor")
def test_a_perfect_answer_and_a_useless_one(tmp_path: Path) -> None:
    truth = {"v": annotated((DOG, 0, 50), (CAT, 50, 100))}
    assert run(tmp_path, {"v": answer((DOG, 0, 49), (CAT, 50, 99))}, [truth]) == 0
    perfect = numbers(tmp_path)
    assert perfect["soda_c"] == pytest.approx(perfect["METEOR"]) == pytest.approx(100.0)
    assert perfect["CIDEr"] == pytest.approx(1000.0)
    assert run(tmp_path, {"v": answer(("purple elephants drum loudly", 0, 49))}, [truth]) == 0
    assert [numbers(tmp_path)[name] for name in ("soda_c", "METEOR", "CIDEr")] == [0.0, 0.0, 0.0]


@needs_java
@pytest.mark.usefixtures("shared_meteor")
def test_strict_counts_a_missing_video_as_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = {name: annotated((DOG, 0, 50), (CAT, 50, 100)) for name in ("v", "w")}
    answers = {"v": answer((DOG, 0, 49), (CAT, 50, 99))}
    assert run(tmp_path, answers, [truth], "--protocol", "published") == 0
    published = numbers(tmp_path)
    assert "1 of 2 videos have no answer and are left out" in capsys.readouterr().out
    assert run(tmp_path, answers, [truth]) == 0
    assert "1 of 2 videos have no answer and count as 0" in capsys.readouterr().out
    for name in ("soda_c", "METEOR", "CIDEr"):
        assert numbers(tmp_path)[name] == pytest.approx(published[name] / 2)


@needs_java
@pytest.mark.usefixtures("shared_meteor")
def test_the_order_of_the_events_does_not_matter(tmp_path: Path) -> None:
    events, found = [(DOG, 0, 50), (CAT, 50, 100)], [(DOG, 0, 49), (CAT, 50, 99)]
    for order in (events, events[::-1]):
        for answers in (found, found[::-1]):
            assert run(tmp_path, {"v": answer(*answers)}, [{"v": annotated(*order)}]) == 0
            assert numbers(tmp_path)["soda_c"] == pytest.approx(100.0)


@needs_java
@pytest.mark.usefixtures("shared_meteor")
def test_two_annotators(tmp_path: Path) -> None:
    """SODA_c is the mean over the annotators; METEOR and CIDEr pair a prediction with the captions of both."""
    one, two = {"v": annotated((DOG, 0, 50))}, {"v": annotated((CAT, 0, 50)), "w": annotated((CAT, 0, 100))}
    answers = {"v": answer((DOG, 0, 49)), "w": answer((CAT, 0, 99))}
    assert run(tmp_path, answers, [one, two]) == 0
    both = numbers(tmp_path)
    assert both["soda_c"] == pytest.approx(100 * fmean((1, fmean((0, 1)))), abs=0.1)
    captions = [(Caption(text, 0, 50),) for text in (DOG, CAT)]
    v = Video(captions[0], {0: captions[0], 1: captions[1]})
    assert [len(scores._pairs(v, {DOG: DOG, CAT: CAT}, tiou)) for tiou in (0.3, 0.9)] == [2, 2]
    assert both["videos"] == both["answers"] == 2
    assert run(tmp_path, answers, [{"v": annotated((DOG, 0, 9), duration=9)}, two]) == 1


def test_pairs_by_hand() -> None:
    references = (Caption("r1", 0, 10), Caption("r2", 5, 15))
    predicted = (Caption("p1", 0, 10), Caption("p2", 0, 7.5), Caption("p3", 90, 99))
    video = Video(predicted, {0: references})
    tokens = {name: name for name in ("r1", "r2", "p1", "p2", "p3")}
    assert scores._pairs(video, tokens, 0.3) == [("p1", "r1"), ("p1", "r2"), ("p2", "r1"), ("p3", NO_MATCH)]
    assert scores._pairs(video, tokens, 0.7) == [("p1", "r1"), ("p2", "r1"), ("p3", NO_MATCH)]
    assert scores._pairs(video, tokens, 0.9) == [("p1", "r1"), ("p2", NO_MATCH), ("p3", NO_MATCH)]
    assert scores._pairs(Video((), {0: references}), tokens, 0.3) == []
    assert scores._pairs(Video(predicted, {0: ()}), tokens, 0.3) == [(f"p{i}", NO_MATCH) for i in (1, 2, 3)]


@needs_java
@pytest.mark.usefixtures("shared_meteor")
def test_cider_of_a_video_by_hand() -> None:
    """One of two predictions is right: CIDEr-D 10 for it, 0 for the other. A single pair has no document frequencies."""
    right, wrong = Caption(DOG, 0, 50), Caption(CAT, 90, 99)
    video = Video((right, wrong), {0: (right,)})
    assert caption_scores([video], "strict")["CIDEr"] == pytest.approx(500.0)
    assert caption_scores([Video((right,), {0: (right,)})], "strict")["CIDEr"] == 0.0


@needs_java
@pytest.mark.usefixtures("shared_meteor")
def test_odd_answers_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    truth = {name: annotated((DOG, 0, 50)) for name in "abcde"}
    answers = {
        "a": "I see a dog.",
        "b": answer((DOG, 0, 49))[:-1],
        "c": '[{"event": "a dog"}]',
        "d": answer((DOG, 0, 49), (DOG, 50, 120)),
        "e": answer((CAT, 40, 10)),
    }
    assert run(tmp_path, answers, [truth]) == 0
    found = numbers(tmp_path)
    assert found["answers without an event"] == 2 and found["answers with broken JSON"] == 2
    assert found["answers with a faulty event"] == found["answers past the end"] == found["answers reversed"] == 1
    assert found["events"] == 4 and found["events merged"] == 1
    assert "2 of 5 answers without an event, such as 'I see a dog.'" in capsys.readouterr().out
    assert not caplog.records
    assert run(tmp_path, {"a": "A dog."}, [truth]) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_malformed_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pite.evaluate.captioning.java.package", lambda: tmp_path)
    truth = {"v": annotated((DOG, 0, 50))}
    for answers, files, message in (
        ({"w": "[]"}, [truth], "p.jsonl:1: field 'video_id' names 'w', which the ground truth does not have"),
        ({}, [truth], "p.jsonl: holds no line whose task is 'captioning'"),
        ({"v": "[]"}, [{"v": {}}], "val_1.json: video 'v': field 'duration' is missing"),
        ({"v": "[]"}, [truth, {"v": annotated(duration=3)}], "val_2.json: video 'v': field 'duration' is 3, but 100"),
    ):
        assert run(tmp_path, answers, files) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_two_answers_about_one_video_are_refused(tmp_path: Path) -> None:
    line = {"video_id": "v", "task": "captioning", "query_id": 0, "answer": "[]"}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps({**line, 'query_id': 1})}\n")
    (tmp_path / "g.json").write_text(json.dumps({"v": annotated((DOG, 0, 50))}))
    truth = captioning.read_truth(tmp_path / "g.json")
    with pytest.raises(ValueError, match=r"p\.jsonl:2: answers about the same video as .*p\.jsonl:1; keep one"):
        captioning.read_answers(tmp_path / "p.jsonl", truth)


def test_there_is_one_question_for_each_video(tmp_path: Path) -> None:
    for name, videos in (("1", "vw"), ("2", "wx")):
        (tmp_path / name).write_text(json.dumps({video: annotated((DOG, 0, 50)) for video in videos}))
    truth = captioning.read_truth(tmp_path / "1", tmp_path / "2")
    assert [(q.video, q.task, q.query_id) for q in captioning.questions(truth)] == [
        (video, "captioning", 0) for video in "vwx"
    ]
    assert {q.text for q in captioning.questions(truth)} == {captioning.QUESTION}
    assert [sorted(each.annotators) for each in truth.values()] == [[0], [0, 1], [1]]


def test_without_java_the_command_ends_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pycocoevalcap").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert run(tmp_path, {"v": "[]"}, [{"v": {}}]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pite.evaluate: dense captioning is scored with METEOR, which needs Java: install it")
    assert error.count("\n") == 1
