"""Describe a scene in records of the real data sets, with the published field names."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataloaders.synthetic.scene import Scene, Thing, key_point_tracks

Record = dict[str, Any]

GROUNDING_QUESTION = "During which frames can we see {}?"
"""Template for a sentence in lower case without its full stop."""

TIMES_FIRST = "Describe the video in detail, with the time of each event first."
TIMES_LAST = "Describe the video in detail, with the time of each event last."
_WORD_SECONDS = 0.4
_NUMBERS = ("no", "one", "two", "three")


def sentence(thing: Thing) -> str:
    return f"{thing.phrase} moves {thing.direction}"


def place(x: float, y: float) -> str:
    """The ninth of the image that a point is in, such as "at the top left"."""
    row = ("top", "", "bottom")[min(int(y * 3), 2)]
    column = ("left", "", "right")[min(int(x * 3), 2)]
    return f"at the {f'{row} {column}'.strip()}" if row or column else "in the middle"


def times(scene: Scene, thing: Thing) -> tuple[float, float]:
    """First and last second of a thing's event."""
    return scene.seconds(thing.first), scene.seconds(thing.last)


def interval(scene: Scene, thing: Thing, num_frames: int) -> str:
    """An event as two-digit indices on `num_frames` frames, "05 to 12" (PiTe section 3)."""
    marks = (min(round(t / scene.duration * num_frames), num_frames - 1) for t in times(scene, thing))
    return " to ".join(f"{mark:02d}" for mark in marks)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def pite_record(name: str, scene: Scene, rng: np.random.Generator) -> Record:
    """One line of PiTe-143k: a dense caption with marked times, and the trajectory of every noun phrase."""
    times_first = rng.random() < 0.75
    answer = ""
    marks: dict[str, float] = {}
    trajectories = []
    for i, thing in enumerate(scene.things):
        text = sentence(thing)
        text = f"From <s{i}> to <e{i}>, {text}." if times_first else f"{_capital(text)}, from <s{i}> to <e{i}>."
        answer += " " * bool(answer)
        start = len(answer) + text.lower().index(thing.phrase)
        answer += text
        begin, end = times(scene, thing)
        marks |= {f"<s{i}>": begin, f"<e{i}>": end}
        points = [[[x, y] if x >= 0 else [-1, -1] for x, y in track.tolist()] for track in key_point_tracks(scene, i)]
        phrase = answer[start : start + len(thing.phrase)]
        trajectories.append({"turn": 0, "phrase": phrase, "start": start, "times": [begin, end], "points": points})
    question = TIMES_FIRST if times_first else TIMES_LAST
    return {
        "source": "synthetic",
        "id": name,
        "conversations": [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}],
        "meta": {"duration": scene.duration, "token": marks},
        "trajectories": trajectories,
    }


def activitynet_record(scene: Scene) -> Record:
    """The value of one video in ActivityNet Captions."""
    return {
        "duration": scene.duration,
        "timestamps": [list(times(scene, thing)) for thing in scene.things],
        "sentences": [f"{_capital(sentence(thing))}." for thing in scene.things],
    }


def valley_records(name: str, scene: Scene, num_frames: int, rng: np.random.Generator) -> list[Record]:
    """Questions about when a thing is visible: one for each of at most two things, though a video has up to three.

    Valley has no time marks, so the answer contains indices of `num_frames` frames.
    """
    chosen = rng.permutation(len(scene.things))[:2]
    return [
        {
            "source": "synthetic",
            "v_id": name,
            "conversations": [
                {"from": "human", "value": f"<video>\n{GROUNDING_QUESTION.format(sentence(scene.things[i]))}"},
                {"from": "gpt", "value": f"From {interval(scene, scene.things[i], num_frames)}."},
            ],
        }
        for i in chosen
    ]


def instruct_record(name: str, scene: Scene, rng: np.random.Generator) -> Record:
    """One question of VideoInstruct100K: a direction, a colour, an order or a count."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    directions = [other.direction for other in scene.things]
    alone = [other.phrase for other in scene.things].count(thing.phrase) == 1
    kind = rng.choice(["direction", "colour", "first", "count"] if alone else ["colour", "count"])
    if kind == "colour" and directions.count(thing.direction) == 1:
        question = f"What colour is the shape that moves {thing.direction}?"
        answer = f"It is {thing.colour}."
    elif kind == "first":
        question = "Which shape can be seen first?"
        answer = f"The {scene.things[0].colour} {scene.things[0].shape} can be seen first."
    elif kind == "count":
        count = len(scene.things)
        question = "How many shapes can be seen?"
        answer = f"There {'is' if count == 1 else 'are'} {_NUMBERS[count]} shape{'s' * (count > 1)}."
    else:
        question = f"Which direction does the {thing.colour} {thing.shape} move?"
        answer = f"It moves {thing.direction}."
    return {"q": question, "a": answer, "video_id": name}


def narrative_record(name: str, scene: Scene, rng: np.random.Generator) -> Record:
    """One line of Localized Narratives: a still described from left to right, with mouse circles around each thing."""
    words: list[str] = []
    traces = []
    for thing in sorted(scene.things, key=lambda thing: float(thing.path[0, 0])):
        x, y = thing.path[0]
        described = f"{_capital(thing.phrase)} is {place(x, y)}.".split()
        begin, end = len(words) * _WORD_SECONDS, (len(words) + len(described)) * _WORD_SECONDS
        words += described
        clock = np.arange(begin, end, 0.1)
        angle = 2 * np.pi * (clock + rng.random())
        wobble = rng.uniform(0.02, 0.05)
        traces.append(
            [
                {
                    "x": round(float(x + wobble * np.cos(a)), 4),
                    "y": round(float(y + wobble * np.sin(a)), 4),
                    "t": round(float(t), 3),
                }
                for a, t in zip(angle, clock)
            ]
        )
    timed = [
        {"utterance": word, "start_time": round(i * _WORD_SECONDS, 3), "end_time": round((i + 1) * _WORD_SECONDS, 3)}
        for i, word in enumerate(words)
    ]
    return {
        "dataset_id": "synthetic",
        "image_id": name,
        "annotator_id": 0,
        "caption": " ".join(words),
        "timed_caption": timed,
        "traces": traces,
        "voice_recording": "",
    }
