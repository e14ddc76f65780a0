"""The published files of the five benchmarks, made by hand, and the errors that such files contain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pite.evaluate.qa.benchmarks import BENCHMARKS, Benchmark, Item, read_items
from pite.evaluate.qa.task import questions


def written(folder: Path, name: str, content: object) -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_msvd_qa_and_its_names_on_youtube(tmp_path: Path) -> None:
    records = [
        {"answer": "someone", "id": 30933, "question": "who does a dance?", "video_id": 1301},
        {"answer": "two", "id": 30934, "question": "how many men run?", "video_id": 1302},
    ]
    file = written(tmp_path, "test_qa.json", records)
    names = written(tmp_path, "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1301\njfrrO5K_vKM_55_65 vid1302\n")
    assert read_items("msvd_qa", [file]) == [
        Item(30933, "vid1301", ("who does a dance?",), "someone"),
        Item(30934, "vid1302", ("how many men run?",), "two"),
    ]
    assert [item.video for item in read_items("msvd_qa", [file], names)] == ["-4wsuPCjDBc_5_15", "jfrrO5K_vKM_55_65"]
    for text, message in (("x vid1301\n", "has no name for 'vid1302'"), ("x\n", ":1: expected a name and vidNUMBER")):
        with pytest.raises(ValueError, match=message):
            read_items("msvd_qa", [file], written(tmp_path, "m.txt", text))


def test_msrvtt_qa(tmp_path: Path) -> None:
    record = {"answer": "couch", "category_id": 14, "id": 158581, "question": "what did he sit on?", "video_id": 6513}
    file = written(tmp_path, "test_qa.json", [record])
    assert read_items("msrvtt_qa", [file]) == [Item(158581, "video6513", ("what did he sit on?",), "couch")]


def pair(folder: Path, video: str, question: str) -> list[Path]:
    q = [{"video_name": video, "question": "is it a dog", "question_id": question}]
    return [
        written(folder, "test_q.json", q),
        written(folder, "test_a.json", [{"answer": "no", "type": 3, "question_id": question}]),
    ]


@pytest.mark.parametrize(
    ("video", "question", "file"),
    [
        ("1QIUV7WYKXg", "v_1QIUV7WYKXg_3", "v_1QIUV7WYKXg"),
        ("v_1QIUV7WYKXg", "v_1QIUV7WYKXg_3", "v_1QIUV7WYKXg"),
        ("v_abcdefghi", "v_v_abcdefghi_1", "v_v_abcdefghi"),
    ],
)
def test_activitynet_qa_has_the_names_of_the_files(tmp_path: Path, video: str, question: str, file: str) -> None:
    assert read_items("activitynet_qa", pair(tmp_path, video, question)) == [
        Item(question, file, ("is it a dog",), "no")
    ]


@pytest.mark.parametrize("name", ["msvd_qa", "msrvtt_qa", "tgif_qa"])
def test_the_others_in_the_form_of_activitynet_qa(tmp_path: Path, name: Benchmark) -> None:
    assert read_items(name, pair(tmp_path, "jfrrO5K_55", "v_jfrrO5K_55_0")) == [
        Item("v_jfrrO5K_55_0", "jfrrO5K_55", ("is it a dog",), "no")
    ]


TGIF = "gif_name\tquestion\tanswer\ttype\tvid_id\tdescription\n"


def test_tgif_qa(tmp_path: Path) -> None:
    rows = 'tumblr_a\thow many dogs play ?\ttwo\t1\t25889\ttwo dogs play .\ntumblr_a\tis it a "cat" ?\tno\t0\t1\t\n'
    file = written(tmp_path, "Test_frameqa_question.csv", TGIF + rows)
    assert read_items("tgif_qa", [file]) == [
        Item(0, "tumblr_a", ("how many dogs play ?",), "two"),
        Item(1, "tumblr_a", ('is it a "cat" ?',), "no"),
    ]


def test_video_chatgpt(tmp_path: Path) -> None:
    generic = written(tmp_path, "generic_qa.json", [{"Q": "What?", "A": "A dog.", "video_name": "v_x"}])
    temporal = written(tmp_path, "temporal_qa.json", [{"Q": "When?", "A": "First.", "video_name": "v_x"}])
    consistency = written(
        tmp_path, "consistency_qa.json", [{"Q1": "Who?", "Q2": "Which one?", "A": "He.", "video_name": "v_x"}]
    )
    items = read_items("video_chatgpt", [generic, temporal, consistency])
    assert items == [
        Item("generic/0", "v_x", ("What?",), "A dog.", "generic"),
        Item("temporal/0", "v_x", ("When?",), "First.", "temporal"),
        Item("consistency/0", "v_x", ("Who?", "Which one?"), "He.", "consistency"),
    ]
    assert [(q.query_id, q.text) for q in questions(items, "video_chatgpt")] == [
        ("generic/0", "What?"),
        ("temporal/0", "When?"),
        ("consistency/0/1", "Who?"),
        ("consistency/0/2", "Which one?"),
    ]


def test_questions_carry_the_benchmarks_name(tmp_path: Path) -> None:
    items = read_items("activitynet_qa", pair(tmp_path, "1QIUV7WYKXg", "v_1QIUV7WYKXg_3"))
    (question,) = questions(items, "activitynet_qa", "{}? Answer in one word.")
    assert (question.video, question.task, question.query_id) == ("v_1QIUV7WYKXg", "activitynet_qa", "v_1QIUV7WYKXg_3")
    assert question.text == "is it a dog? Answer in one word."


GOOD = {"answer": "a", "id": 1, "question": "q", "video_id": 1}


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("msvd_qa", {"t.json": [GOOD, {**GOOD, "video_id": "vid1"}]}, r"t\.json:1.*field 'video_id' must be int"),
        ("msvd_qa", {"t.json": [GOOD, GOOD]}, r"question 1 about video 'vid1' is there twice"),
        ("msvd_qa", {"t.json": []}, r"t\.json: holds no question"),
        ("msvd_qa", {"t.json": "nonsense"}, r"t\.json:1"),
        ("msvd_qa", {"a": [], "b": [], "c": []}, "msvd_qa has one file, or one of questions and one of answers, not 3"),
        ("activitynet_qa", {"t.json": []}, "activitynet_qa has two files: give test_q.json and test_a.json"),
        (
            "activitynet_qa",
            {"q": [{"video_name": "x", "question": "q", "question_id": "v_x_1"}], "a": []},
            r"q:1.*a has no answer to question 'v_x_1'",
        ),
        ("tgif_qa", {"t.csv": "gif_name\tquestion\n"}, "lacks the column 'answer'; TGIF-QA's open questions are in"),
        (
            "tgif_qa",
            {"t.csv": "gif_name\tquestion\ta1\ta2\tanswer\n"},
            "has multiple choices; TGIF-QA's open questions",
        ),
        (
            "tgif_qa",
            {"t.csv": TGIF + "x\t\ttwo\t1\t2\t\n"},
            r"t\.csv:2: gif_name, question and answer must not be empty",
        ),
        ("video_chatgpt", {"qa.json": []}, r"the name must be one of generic_qa\.json, temporal_qa\.json"),
        ("video_chatgpt", {"temporal_qa.json": [{"Q": "q", "video_name": "v"}]}, "field 'A' is missing"),
        (
            "video_chatgpt",
            {"generic_qa.json": [{"Q": "q", "A": "a", "video_name": "../v"}]},
            "cannot name a media file",
        ),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: Benchmark, files: dict, message: str) -> None:
    paths = [written(tmp_path, file, content) for file, content in files.items()]
    with pytest.raises(ValueError, match=message):
        read_items(name, paths)


def test_every_benchmark_is_tested() -> None:
    assert set(BENCHMARKS) == {"msvd_qa", "msrvtt_qa", "activitynet_qa", "tgif_qa", "video_chatgpt"}
