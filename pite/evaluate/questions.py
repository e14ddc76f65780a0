"""A question to the model, as each benchmark makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, str, int | str, int | str | None]
"""What identifies a question and its answer: video, task, query id, and sentence id where the task has one."""


@dataclass(frozen=True)
class Question:
    """One question to the model about one video.

    video     id of the video; the key of its features is the split and this id
    task      name of the benchmark in the prediction log, such as "grounding"
    query_id  number or name of the question among those of its video and task
    text      the question as it is put to the model
    info      fields of the prediction's `info`; `sentence_id` is a part of the key
    """

    video: str
    task: str
    query_id: int | str
    text: str
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return key_of(self.video, self.task, self.query_id, self.info)


def key_of(video: str, task: str, query_id: int | str, info: Mapping[str, Any]) -> Key:
    return video, task, query_id, info.get("sentence_id")
