"""Captioned videos to annotate, from ActivityNet Captions, InternVid's lists, or records that lack trajectories.

    {vid: {duration, timestamps: [[start, end], ...], sentences}}     ActivityNet Captions: whole files
    {"YoutubeID", "Start_timestamp", "End_timestamp", "Caption"}       InternVid, a line per clip of a source
    {"id", "conversations", "meta": {"split", "duration", "token"}}    VTimeLLM's stage 2: conversations with marks

A clip of InternVid gets the id `{YoutubeID}_{start}_{end}`, by which `fields.locate` cuts it from its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from dataloaders.annotation.pipeline import Video
from dataloaders.annotation.record import Existing
from dataloaders.failures import Failure
from dataloaders.formats import Record, Where, read_activitynet, read_each, read_pite
from dataloaders.formats.activitynet import Event, EventVideo, activitynet_media
from dataloaders.formats.fields import (
    conversation,
    cut_of,
    field,
    identifier,
    is_number,
    locate,
    names_in,
    seconds,
    shown,
)
from dataloaders.formats.pite_143k import pite_media
from dataloaders.records import Media, RecordError, clash

_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)")
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|\Z)|\Z)", re.DOTALL)
_PAIR = re.compile(
    r",?\s*(?:\b(?:from|between|during)\s+)?(?P<begin><s(?P<number>\d+)>)\s*(?:to|and|until|-)?\s*(?P<end><e(?P=number)>)"
    r",?\s*|(?:\b(?:at|in)\s+)?<[se]\d+>|</?s>",
    re.IGNORECASE,
)

Reader = Callable[[Record, Where, Path], Video]


def read_captions(captions: Path, videos: Path) -> Iterator[Video | Failure]:
    """Captioned videos in order, and a Failure for each record that cannot be read. Raises ValueError if it is not JSON.

    captions  in the format of ActivityNet Captions or InternVid
    """

    def read(record: Record, where: Where, folder: Path) -> Video:
        return _internvid(record, where, folder) if "YoutubeID" in record else _activitynet(record, where, folder)

    seen: set[str] = set()
    for where, found in _read(captions, videos, read):
        if isinstance(found, Video) and found.name in seen:
            found = Failure(found.name, str(captions), "read", f"{where}: duplicate id {found.name!r}")
        elif isinstance(found, Video):
            seen.add(found.name)
        yield found


def read_records(records: Path, videos: Path) -> Iterator[Video | Failure]:
    """Clips of records in VTimeLLM's form, in order. An event is a sentence of an answer with a pair of marks, or of an
    answer without marks to a question with one.

    Several records may share a clip; their names differ by a number. One id for two clips is a Failure.
    """
    known: dict[str, Media] = {}
    counts: dict[str, int] = {}
    for where, found in _read(records, videos, _vtimellm):
        if isinstance(found, Video):
            name = found.name
            first = known.setdefault(name, found.media)
            if first != found.media:
                yield Failure(name, str(records), "read", f"{where}: {clash(first, found.media)}")
                continue
            counts[name] = counts.get(name, 0) + 1
            found = found if counts[name] == 1 else replace(found, name=f"{name}.{counts[name]}")
        yield found


def _read(path: Path, videos: Path, read: Reader) -> Iterator[tuple[Where, Video | Failure]]:
    def placed(record: Record, where: Where) -> Video:
        video = read(record, where, videos)
        media = replace(video.media, path=videos / f"{video.name}.mp4")
        return replace(video, media=locate(media, names_in(media.path.parent)))

    for where, record, found in read_each(path, placed):
        if isinstance(found, RecordError):
            name = record.get("id", record.get("YoutubeID"))
            yield where, Failure(name if isinstance(name, str) else str(where), str(path), "read", str(found))
        else:
            yield where, found


def _activitynet(record: Record, where: Where, videos: Path) -> Video:
    captions = read_activitynet(record, where, videos)
    return Video(identifier(record, "id", where), activitynet_media(record, where, videos), where.path.stem, captions)


def _internvid(record: Record, where: Where, videos: Path) -> Video:
    source = identifier(record, "YoutubeID", where)
    start, end = (_clock(record, name, where) for name in ("Start_timestamp", "End_timestamp"))
    name = f"{source}_{start:.3f}_{end:.3f}"
    if start >= end:
        raise RecordError(f"{where}: field 'End_timestamp': {end:g} s is not after 'Start_timestamp', {start:g} s")
    if cut_of(name) is None:
        raise RecordError(f"{where}: field 'YoutubeID' must be the 11 characters of an id, not {shown(source)}")
    caption = field(record, "Caption", str, where).strip()
    if not caption:
        raise RecordError(f"{where}: field 'Caption' is empty")
    media, lasts = Media(name, videos / f"{name}.mp4"), round(end - start, 3)
    return Video(name, media, "internvid", EventVideo(name, name, lasts, (Event(0.0, lasts, caption),)))


def _clock(record: Record, name: str, where: Where) -> float:
    """Seconds of a time such as 00:01:23.400, or of a number."""
    value = field(record, name, (str, int, float), where)
    if is_number(value):
        return seconds(value, name, where)
    found = _CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise RecordError(f"{where}: field {name!r} must be a time such as 00:01:23.400, not {shown(value)}")
    hours, minutes, rest = found.groups(default="0")
    return seconds(3600 * float(hours) + 60 * float(minutes) + float(rest), name, where)


def _vtimellm(record: Record, where: Where, videos: Path) -> Video:
    bare = {name: value for name, value in record.items() if name != "trajectories"}
    read_pite(bare, where, videos, num_frames=100, num_points=1)  # All checks of the fields.
    media, duration = pite_media(bare, where, videos), record["meta"]["duration"]
    times = record["meta"].get("token") or {}
    spots, events, marks = [], [], []
    for turn, (question, answer) in enumerate(conversation(record, where)):
        for sentence, offset, pair in _described(question, answer):
            start, end = (seconds(times[mark], f"meta.token.{mark}", where, duration) for mark in pair)
            spots.append((turn, offset))
            marks.append(pair)
            events.append(Event(start, end, sentence))
    name = identifier(record, "id", where)
    captions = EventVideo(name, media.key, float(duration), tuple(events))
    return Video(name, media, where.path.stem, captions, Existing(bare, tuple(spots), tuple(marks)))


def _described(question: str, answer: str) -> Iterator[tuple[str, int, tuple[str, str]]]:
    """(text, its offset in the answer, marks of its interval) of each sentence that describes a timed event."""
    of_question = _marks(question) if not _marks(answer) else None
    for sentence in _SENTENCE.finditer(answer):
        pair = _marks(sentence[0]) or of_question
        if pair is None:
            continue
        gaps = [(found.start(), found.end()) for found in _PAIR.finditer(answer, *sentence.span())]
        edges = [sentence.start(), *(edge for gap in gaps for edge in gap), sentence.end()]
        begin, end = max(zip(edges[::2], edges[1::2]), key=lambda part: part[1] - part[0])
        text = answer[begin:end].strip(" \n\t(),;:")
        if any(character.isalpha() for character in text):
            yield text, answer.index(text, begin), pair


def _marks(text: str) -> tuple[str, str] | None:
    """The first pair of marks in a text."""
    found = next((found for found in _PAIR.finditer(text) if found["begin"]), None)
    return None if found is None else (found["begin"], found["end"])
