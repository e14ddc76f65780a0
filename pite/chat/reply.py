"""What a model answered: the text, and when and where what it names happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pite.chat.videos import Video
from pite.draw import Track
from pite.generate import Answer
from pite.mentions import Phrase, find_intervals, find_named, find_phrases


@dataclass(frozen=True)
class Event:
    """An interval that an answer gives.

    frames   first and last frame index, both of 0 to N - 1
    seconds  their times in the video; None for a file without times
    text     the sentence with the interval
    """

    frames: tuple[int, int]
    seconds: tuple[float, float] | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        seconds = None if self.seconds is None else [round(second, 3) for second in self.seconds]
        return {"frames": list(self.frames), "seconds": seconds, "text": self.text}


@dataclass(frozen=True)
class Reply:
    """An answer about a video.

    token_ids           the generated tokens, without `</s>`
    events              the intervals in the text, in its order
    tracks              predicted key points of the noun phrases in the text, or of the phrases that were given
    num_frames          N
    duration            seconds of the video; None for a file without times
    times               seconds at which each of the N frames is shown; empty for a file without times
    """

    text: str
    token_ids: tuple[int, ...]
    events: tuple[Event, ...]
    tracks: tuple[Track, ...]
    num_frames: int
    duration: float | None
    times: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "answer": self.text,
            "events": [event.as_dict() for event in self.events],
            "tracks": [track.as_dict() for track in self.tracks],
            "token_ids": list(self.token_ids),
            "num_frames": self.num_frames,
            "duration": self.duration,
            "times": [round(time, 3) for time in self.times],
        }


def reply_of(
    answer: Answer,
    trajectories: np.ndarray,
    video: Video,
    tokenizer: PreTrainedTokenizerBase,
    phrases: Sequence[str] = (),
) -> Reply:
    """The reply of an answer, with the trajectories (L, P, N, 2) that were predicted for its tokens."""
    count = video.num_frames
    has_tracks = len(trajectories) > 0
    return Reply(
        text=answer.text,
        token_ids=answer.token_ids,
        events=tuple(events_of(answer.text, video)),
        tracks=tuple(named_tracks(answer, trajectories, tokenizer, phrases)) if has_tracks else (),
        num_frames=count,
        duration=video.duration,
        times=video.times,
    )


def events_of(text: str, video: Video) -> list[Event]:
    """The intervals of an answer about a video."""
    events = []
    for interval in find_intervals(text, video.num_frames):
        start, end = video.seconds(interval.first), video.seconds(interval.last)
        seconds = None if start is None or end is None else (start, end)
        events.append(Event((interval.first, interval.last), seconds, interval.sentence))
    return events


def named_tracks(
    answer: Answer, trajectories: np.ndarray, tokenizer: PreTrainedTokenizerBase, names: Sequence[str] = ()
) -> list[Track]:
    """Predicted track of each noun phrase of an answer, or of each occurrence of one of `names`.

    A phrase's track is the mean over its tokens: in training all tokens of a phrase have the same target.
    """
    num_frames = trajectories.shape[2]
    phrases = find_named(answer.text, names, num_frames) if names else find_phrases(answer.text, num_frames)
    starts, ends = token_spans(tokenizer, answer).T
    tracks = []
    for phrase in phrases:
        tokens = (starts < phrase.end) & (ends > phrase.start)
        tracks.append(Track(phrase.text, trajectories[tokens].mean(0), span=_span(phrase, num_frames)))
    return tracks


def token_spans(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> np.ndarray:
    """Character span (L, 2) in `answer.text` of each generated token: start, and end (exclusive).

    Every prefix is decoded, because tokenizing the text again may give other tokens than were generated.
    """
    texts = [
        str(tokenizer.decode(list(answer.token_ids[:count]), skip_special_tokens=True))
        for count in range(len(answer.token_ids) + 1)
    ]
    stripped = len(texts[-1]) - len(texts[-1].lstrip())
    ends = np.array([len(text) for text in texts]) - stripped
    return np.stack([ends[:-1], ends[1:]], axis=1).clip(0, len(answer.text))


def _span(phrase: Phrase, num_frames: int) -> tuple[int, int] | None:
    if phrase.interval is None:
        return None
    first, last = (round(time * num_frames) for time in phrase.interval)
    return min(first, last), max(first, last)
