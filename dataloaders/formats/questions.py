"""Benchmarks of video question answering, for evaluation: the video that a record of a published file is about.

    msvd_qa.json, msrvtt_qa.json             {"id", "video_id": 1301, "question", "answer"}: vid1301 and video1301
    activitynet_qa_q.json, tgif_qa_q.json    {"question_id", "video_name", "question"}; the answers are in another file
    generic_qa.json, temporal_qa.json, consistency_qa.json    Video-ChatGPT's: {"video_name", ...}

The questions and answers themselves are read by `pite.evaluate.qa`.
"""

from __future__ import annotations

from pathlib import Path

from dataloaders.formats.fields import Place, field, identifier
from dataloaders.formats.stream import Record
from dataloaders.records import Media


def msvd_video(record: Record, where: Place) -> str:
    return f"vid{field(record, 'video_id', int, where)}"


def msrvtt_video(record: Record, where: Place) -> str:
    return f"video{field(record, 'video_id', int, where)}"


def named_video(record: Record, where: Place) -> str:
    return identifier(record, "video_name", where)


def activitynet_video(record: Record, where: Place) -> str:
    """The video's name as that of its file, with the `v_` that the ids of the questions have."""
    name = named_video(record, where)
    question = str(field(record, "question_id", (str, int), where))
    return f"v_{name}" if question.startswith(f"v_{name}_") else name


def msvd_media(record: Record, where: Place, folder: Path) -> Media:
    return _media(folder, msvd_video(record, where))


def msrvtt_media(record: Record, where: Place, folder: Path) -> Media:
    return _media(folder, msrvtt_video(record, where))


def named_media(record: Record, where: Place, folder: Path) -> Media:
    return _media(folder, named_video(record, where))


def activitynet_qa_media(record: Record, where: Place, folder: Path) -> Media:
    return _media(folder, activitynet_video(record, where))


def _media(folder: Path, name: str) -> Media:
    """The video `folder`/videos/{name}.mp4; a file of another suffix is found later (`fields.locate`)."""
    return Media(f"{folder.name}/{name}", folder / "videos" / f"{name}.mp4")
