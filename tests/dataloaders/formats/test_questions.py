"""The videos that the files of video question answering name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataloaders.formats import SPLITS
from dataloaders.media import list_media
from dataloaders.records import RecordError

FILES = {
    "msvd_qa.json": ({"id": 0, "video_id": 1301, "question": "who?", "answer": "man"}, "vid1301"),
    "msrvtt_qa.json": ({"id": 0, "video_id": 6513, "category_id": 1, "question": "who?", "answer": "man"}, "video6513"),
    "activitynet_qa_q.json": ({"question_id": "v_1QIUV7WYKXg_3", "video_name": "1QIUV7WYKXg"}, "v_1QIUV7WYKXg"),
    "tgif_qa_q.json": ({"question_id": "FRAMEQA_3", "video_name": "tumblr_nk172"}, "tumblr_nk172"),
    "generic_qa.json": ({"video_name": "v_p1QGn0IzfW0", "Q": "What?", "A": "A man."}, "v_p1QGn0IzfW0"),
    "temporal_qa.json": ({"video_name": "v_p1QGn0IzfW0", "Q": "When?", "A": "First."}, "v_p1QGn0IzfW0"),
    "consistency_qa.json": ({"video_name": "v_x", "Q1": "What?", "Q2": "Which?", "A": "A man."}, "v_x"),
}


@pytest.mark.parametrize("name", FILES)
def test_each_file_names_its_videos(tmp_path: Path, name: str) -> None:
    record, video = FILES[name]
    folder = tmp_path / "evaluation"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / f"{video}.avi").touch()
    (folder / name).write_text(json.dumps([record, record]))
    found = list_media(tmp_path, ["evaluation"])
    assert not found.malformed
    (media,) = found.media
    assert (media.key, media.path) == (f"evaluation/{video}", folder / "videos" / f"{video}.avi")


def test_a_video_that_captions_and_questions_share_is_listed_once(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    event = {"duration": 9.0, "timestamps": [[1, 2]], "sentences": ["A dog."]}
    (folder / "activitynet_captions.json").write_text(json.dumps({"v_1QIUV7WYKXg": event}))
    (folder / "activitynet_captions_2.json").write_text(json.dumps({"v_1QIUV7WYKXg": event, "v_2": event}))
    (folder / "activitynet_qa_q.json").write_text(json.dumps([FILES["activitynet_qa_q.json"][0]]))
    found = list_media(tmp_path, ["evaluation"])
    assert not found.malformed
    assert [(media.key, media.duration) for media in found.media] == [
        ("evaluation/v_1QIUV7WYKXg", 9.0),
        ("evaluation/v_2", 9.0),
    ]


@pytest.mark.parametrize("record", [{"id": 0}, {"video_id": "x"}, {"video_id": 1.5}, {"video_name": "../x"}])
def test_a_record_that_names_no_video_is_refused(tmp_path: Path, record: dict[str, object]) -> None:
    for kind in SPLITS["evaluation"]:
        if kind.file in FILES:
            with pytest.raises(RecordError, match=r"^x: field 'video_"):
                kind.media(record, "x", tmp_path)
