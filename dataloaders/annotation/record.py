"""Events and their key points to one line of PiTe-143k: "From s to e, ..." or "..., from s to e" (section 4.2)."""

from __future__ import annotations

import hashlib
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
"""Questions, by whether the times come first. The published questions are not known."""

_WORDS = """
    a an the this that these those he she it they we you his her its their my our your one two three four five some
    several many most all both another other each every no people there then next now after afterwards before while when
    as once until in on at by from to with into near behind inside outside under over finally first
"""
_LOWERED = frozenset(_WORDS.split())
"""Words that are written in lower case inside a sentence. Any other word may be a name."""


def pite_record(
    name: str, source: str, video: EventVideo, phrases: Phrases, points: dict[tuple[int, int], np.ndarray]
) -> dict[str, Any]:
    """The record of a whole video file (`meta.split` null).

    points  (P, K, 2) key points by event and phrase, evenly spaced over the event; a phrase may have none
    A hash of `name` selects the question and the form of the answer, so they are the same in every run. Raises
    RecordError for an empty caption.
    """
    choice = hashlib.sha256(name.encode()).digest()
    times_first = choice[0] % 2 == 0
    questions = QUESTIONS[times_first]
    answer, trajectories = "", []
    marks: dict[str, float] = {}
    for i, event in enumerate(video.events):
        begin, end = f"<s{i}>", f"<e{i}>"
        marks |= {begin: event.start, end: event.end}
        lead = f"From {begin} to {end}, " if times_first else ""
        sentence = event.sentence.rstrip(" .!;,")
        if not sentence:
            raise RecordError(f"{name}: the caption of event {i} is {event.sentence!r}, which holds no text")
        text = _uncapitalised(sentence) if times_first else sentence
        offset = len(answer) + bool(answer) + len(lead)
        answer += f"{' ' * bool(answer)}{lead}{text}" + ("." if times_first else f", from {begin} to {end}.")
        for j, phrase in enumerate(phrases[i]):
            if (i, j) in points:
                start = offset + phrase.start
                length = len(sentence[phrase.start : phrase.start + len(phrase.text)])  # Without a last full stop.
                trajectories.append(
                    {
                        "turn": 0,
                        "phrase": answer[start : start + length],
                        "start": start,
                        "times": [event.start, event.end],
                        "points": _rounded(points[i, j]),
                    }
                )
    return {
        "source": source,
        "id": name,
        "conversations": [
            {"from": "human", "value": f"<video>\n{questions[choice[1] % len(questions)]}"},
            {"from": "gpt", "value": answer},
        ],
        "meta": {"split": None, "duration": video.duration, "token": marks},
        "trajectories": trajectories,
    }


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
