"""A chat with fixed answers, for tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pite.chat.reply import Reply, events_of
from pite.chat.videos import Video
from pite.draw import Track

FRAMES = 8
TEXT = "From 02 to 05, a red circle moves right. From 06 to 07, a blue square moves up."


class FakeChat:
    """Answers TEXT, after the visitor's number of earlier questions, in pieces."""

    def __init__(self, duration: float = 9.5) -> None:
        self.last: Reply | None = None
        self.duration = duration
        self.questions: list[str] = []

    def fork(self) -> FakeChat:
        return FakeChat(self.duration)

    def forget(self, video: Path | str) -> None:
        self.questions.clear()

    def stream(self, video: Path | str, question: str, **options: Any) -> Iterator[str]:
        self.last = None
        if "fail" in question:
            raise ValueError(f"{video}: frame 3 is damaged")
        self.questions.append(question)
        text = TEXT + (f" Question {len(self.questions)}: {question}" if len(self.questions) > 1 else "")
        for word in text.split(" "):
            yield f"{word} "
        self.last = self._reply(text)

    def _reply(self, text: str) -> Reply:
        video = Video(Path("v"), np.zeros((FRAMES, 1)), self.duration)
        ramp = np.linspace(0.2, 0.8, FRAMES)
        points = np.stack([np.stack([ramp, np.full(FRAMES, y)], -1) for y in (0.4, 0.5, 0.6)])
        tracks = (
            Track("a red circle", points, span=(2, 5)),
            Track("a blue square", points[..., ::-1].copy(), span=(6, 7)),
        )
        times = tuple(i / FRAMES * self.duration for i in range(FRAMES))
        return Reply(text, (), tuple(events_of(text, video)), tracks, FRAMES, self.duration, times)
