"""Events and their key points to one line of PiTe-143k: "From s to e, ..." or "..., from s to e" (section 4.2)."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataloaders.annotation.steps import Phrases
from dataloaders.formats.activitynet import EventVideo
from dataloaders.records import ABSENT, RecordError

QUESTIONS = {
    True: (
        "What happens in the video? Give the time of each event before you tell it.",
        "Go through the video event by event, and begin each with its first and last frame.",
        "Describe the video in detail, with the time of each event first.",
    ),
    False: (
        "What happens in the video? Give the time of each event after you have told it.",
        "Go through the video event by event, and end each with its first and last frame.",
        "Describe the video in detail, with the time of each event last.",
    ),
}
"""Questions for a description, in our own words, by whether the times come first."""

_WORDS = """
    a an the this that these those he she it they we you his her its their my our your one two three four five some
    several many most all both another other each every no people there then next now after afterwards before while when
    as once until in on at by from to with into near behind inside outside under over finally first
"""
_LOWERED = frozenset(_WORDS.split())
"""Words that are written in lower case inside a sentence. Any other word may be a name."""


WHEN_QUESTIONS = (
    "During which frames does this happen: {}?",
    "When can one see the following: {}?",
    "From which frame to which does the video show this: {}?",
    "Give the first and the last frame of this event: {}.",
    "In which frames is this seen: {}?",
)
"""Questions for the time of an event, in our own words. Evaluation has such questions (temporal grounding)."""

_WHOLE = 0.95
"""Share of a video that an event may last for a question about its time."""

_TIME_ONLY = re.compile(
    r"<[se]\d+>|</?s>|\b(?:from|to|between|and|until|during|in|frames?|the)\b|[\W\d_]", re.IGNORECASE
)
"""What an answer to such a question consists of."""


@dataclass(frozen=True)
class Existing:
    """A record whose conversation is kept: where each event's sentence is, and the marks of its times.

    spots  turn, and character in its answer, of each event's sentence
    marks  such as ("<s0>", "<e0>"), of each event
    """

    record: dict[str, Any]
    spots: tuple[tuple[int, int], ...]
    marks: tuple[tuple[str, str], ...]


def pite_record(
    name: str,
    source: str,
    video: EventVideo,
    phrases: Phrases,
    points: dict[tuple[int, int], np.ndarray],
    when_question: bool = False,
) -> dict[str, Any]:
    """The record of a whole video file, or of a clip that its name describes (`meta.split` null).

    points         (P, K, 2) key points by event and phrase, evenly spaced over the event; a phrase may have none
    when_question  add a question for the time of one event: before the description, or after it
    A hash of `name` selects the questions, their order and the form of the answer, so they are the same in every run.
    Raises RecordError for an empty caption.
    """
    choice = hashlib.sha256(name.encode()).digest()
    times_first = choice[0] % 2 == 0
    questions = QUESTIONS[times_first]
    answer, spots = "", []
    marks: dict[str, float] = {}
    for i, event in enumerate(video.events):
        begin, end = f"<s{i}>", f"<e{i}>"
        marks |= {begin: event.start, end: event.end}
        lead = f"From {begin} to {end}, " if times_first else ""
        sentence = event.sentence.rstrip(" .!;,")
        if not sentence:
            raise RecordError(f"{name}: the caption of event {i} is {event.sentence!r}, which holds no text")
        text = _uncapitalised(sentence) if times_first else sentence
        spots.append((0, len(answer) + bool(answer) + len(lead)))
        answer += f"{' ' * bool(answer)}{lead}{text}" + ("." if times_first else f", from {begin} to {end}.")
    pairs = [(questions[choice[1] % len(questions)], answer)]
    if when_question and (when := _when(name, video, [(f"<s{i}>", f"<e{i}>") for i in range(len(video.events))])):
        pairs.insert(choice[2] % 2, when)
        spots = [(pairs.index(when) ^ 1, offset) for _, offset in spots]
    texts = [text for pair in pairs for text in pair]
    texts[0] = f"<video>\n{texts[0]}"
    return {
        "source": source,
        "id": name,
        "conversations": [_message(i, text) for i, text in enumerate(texts)],
        "meta": {"split": None, "duration": video.duration, "token": marks},
        "trajectories": _trajectories([answer for _, answer in pairs], spots, video, phrases, points),
    }


def with_trajectories(
    existing: Existing,
    video: EventVideo,
    phrases: Phrases,
    points: dict[tuple[int, int], np.ndarray],
    when_question: bool = False,
) -> dict[str, Any]:
    """A record with its conversation as it is, and trajectories of its phrases.

    when_question  add a question for the time of one event as the last turn, if no answer consists of a time only
    """
    record, messages = existing.record, existing.record["conversations"]
    answers = [message["value"] for message in messages[1::2]]
    trajectories = _trajectories(answers, existing.spots, video, phrases, points)
    lacks = when_question and all(_TIME_ONLY.sub("", answer) for answer in answers)
    if lacks and (when := _when(str(record["id"]), video, existing.marks)):
        messages = [*messages, *(_message(i, text) for i, text in enumerate(when))]
    return {**record, "conversations": messages, "trajectories": trajectories}


def _message(index: int, text: str) -> dict[str, str]:
    return {"from": ("human", "gpt")[index % 2], "value": text}


def _when(name: str, video: EventVideo, marks: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """A question for the time of one event and its answer.

    None where no event has a sentence of its own, or where it lasts as long as the video: then nothing is to be found.
    """
    counts = Counter(event.sentence for event in video.events)
    single = [
        i
        for i, event in enumerate(video.events)
        if counts[event.sentence] == 1 and event.end - event.start < _WHOLE * video.duration
    ]
    if not single:
        return None
    choice = hashlib.sha256(f"when {name}".encode()).digest()
    i = single[choice[0] % len(single)]
    sentence = _uncapitalised(video.events[i].sentence.rstrip(" .!;,"))
    return WHEN_QUESTIONS[choice[1] % len(WHEN_QUESTIONS)].format(sentence), f"From {marks[i][0]} to {marks[i][1]}."


def _trajectories(
    answers: Sequence[str],
    spots: Sequence[tuple[int, int]],
    video: EventVideo,
    phrases: Phrases,
    points: dict[tuple[int, int], np.ndarray],
) -> list[dict[str, Any]]:
    """The trajectories of all phrases with key points; `spots` are turn and offset of each event's sentence."""
    trajectories = []
    for i, (event, (turn, offset)) in enumerate(zip(video.events, spots)):
        sentence = event.sentence.rstrip(" .!;,")
        for j, phrase in enumerate(phrases[i]):
            if (i, j) in points:
                start = offset + phrase.start
                length = len(sentence[phrase.start : phrase.start + len(phrase.text)])  # Without a last full stop.
                trajectories.append(
                    {
                        "turn": turn,
                        "phrase": answers[turn][start : start + length],
                        "start": start,
                        "times": [event.start, event.end],
                        "points": _rounded(points[i, j]),
                    }
                )
    return trajectories


def _uncapitalised(sentence: str) -> str:
    first = sentence.partition(" ")[0].rstrip(",")
    return sentence[0].lower() + sentence[1:] if first.lower() in _LOWERED else sentence


def _rounded(points: np.ndarray) -> list[list[list[float]]]:
    """Round to 1/10,000 of the frame, a fifth of a pixel of 1080p; absent points as integers."""
    here = (points != ABSENT).all(-1)
    return [
        [[round(float(x), 4), round(float(y), 4)] if seen else [-1, -1] for (x, y), seen in zip(track, present)]
        for track, present in zip(points, here)
    ]
