"""Scores of dense captioning as text and numbers, with counts of answers and events that lower them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pite.evaluate.captioning.answers import Event, Events, captions, merge, parse
from pite.evaluate.captioning.scores import Video, caption_scores
from pite.evaluate.captioning.task import Truth, answer_of
from pite.evaluate.grounding import NUM_FRAMES
from pite.evaluate.predictions import Prediction
from pite.evaluate.protocols import Protocol
from pite.evaluate.reports import Report, quoted

log = logging.getLogger(__name__)


def report(
    predictions: Sequence[Prediction],
    truth: Truth,
    *,
    protocol: Protocol = "strict",
    num_frames: int = NUM_FRAMES,
) -> Report:
    """Scores of answers whose frame indices count `num_frames` frames per video; the answers name videos of `truth`.

    strict     a video without an answer counts as 0, and indices past the last frame as the last frame
    published  a video without an answer is left out
    Raises ValueError as `caption_scores`.
    """
    answers = answer_of(predictions)
    parsed = {video: parse(answer, protocol) for video, answer in answers.items()}
    events = {
        video: each.events if protocol == "published" else _clipped(each.events, num_frames - 1)
        for video, each in parsed.items()
    }
    scored = [
        Video(tuple(captions(events.get(video, ()), each.duration, num_frames)), each.annotators)
        for video, each in truth.items()
        if video in answers or protocol == "strict"
    ]
    numbers = caption_scores(scored, protocol)
    odd, counts = _odd(answers, parsed, num_frames)
    merged = sum(len(each) - len(merge(each)) for each in events.values())
    total = sum(len(each) for each in events.values())
    lines = [f"{name:<8} {value:6.2f}" for name, value in numbers.items()]
    lines.append(f"over {total:,} events in {len(answers):,} answers; the ground truth has {len(truth):,} videos")
    if merged:
        lines.append(f"{merged:,} events repeat the one before them and are merged with it")
    if missing := len(truth) - len(answers):
        effect = "are left out" if protocol == "published" else "count as 0"
        lines.append(f"{missing:,} of {len(truth):,} videos have no answer and {effect}")
    counts = {"answers": len(answers), "videos": len(truth), "events": total, "events merged": merged, **counts}
    return Report("dense_captioning", "\n".join([*lines, *odd]), {**numbers, **counts, "protocol": protocol})


def _clipped(events: Sequence[Event], last: int) -> tuple[Event, ...]:
    return tuple(replace(each, start=min(each.start, last), end=min(each.end, last)) for each in events)


def _odd(answers: Mapping[str, str], parsed: Mapping[str, Events], num_frames: int) -> tuple[list[str], dict[str, int]]:
    """A line for each kind of answer that a wrong prompt or model gives, with an example, and the number of each."""
    tests = {
        "without an event": [video for video, each in parsed.items() if not each.events],
        "with broken JSON": [video for video, each in parsed.items() if not each.whole],
        "with an event that lacks a sentence or two frames": [video for video, each in parsed.items() if each.faults],
        f"with a frame past the last one, {num_frames - 1}": [
            video for video, each in parsed.items() if any(max(e.start, e.end) >= num_frames for e in each.events)
        ],
        "with a reversed event": [video for video, each in parsed.items() if any(e.start > e.end for e in each.events)],
    }
    lines = [
        f"{len(videos):,} of {len(answers):,} answers {kind}, such as {quoted(answers[videos[0]])}"
        for kind, videos in tests.items()
        if videos
    ]
    if answers and len(tests["without an event"]) == len(answers):
        log.warning("%s: every score is 0", lines[0])
    keys = ("without an event", "with broken JSON", "with a faulty event", "past the end", "reversed")
    return lines, {f"answers {key}": len(videos) for key, videos in zip(keys, tests.values())}
