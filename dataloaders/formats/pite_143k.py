"""PiTe-143k: clips of longer videos, answers with timed events, and tracks of the objects they mention.

The authors did not publish their schema. This one extends the record of VTimeLLM's stage 2 by `trajectories`:

    {"source": "internvid", "id": "v000001",
     "conversations": [{"from": "human", "value": "<video>\\nDescribe the video in detail."},
                       {"from": "gpt", "value": "From <s0> to <e0>, a red circle moves right."}],
     "meta": {"split": [129.8, 184.0], "duration": 54.2, "token": {"<s0>": 0.0, "<e0>": 9.4}},
     "trajectories": [{"turn": 0, "phrase": "a red circle", "start": 19, "times": [0.0, 9.4],
                       "points": [[[0.31, 0.40], [0.33, 0.41], [-1, -1]]]}]}

`turn` is the index of the answer, and `start` the phrase's offset in that answer as written, marks included. All times
are seconds within the clip. Marks may stand in questions too, as in VTimeLLM's "What happens from <s0> to <e0>?".
"""

from __future__ import annotations

import re
from pathlib import Path

from dataloaders.formats.fields import (
    Place,
    Within,
    conversation,
    duration_of,
    durations_differ,
    field,
    identifier,
    interval,
    is_number,
    question_of,
    seconds,
    shown,
    time_to_index,
)
from dataloaders.formats.stream import Record
from dataloaders.formats.tracks import TrackError, place_tracks, validate_tracks
from dataloaders.records import Media, Mention, RecordError, Sample, Turn

_TIME_MARK = re.compile(r"<[se]\d+>")
_MARK = re.compile(rf"\A(?:\s|</?s>)+|(?:\s|</?s>)+\Z|</?s>|(?P<time>{_TIME_MARK.pattern})")


def pite_media(record: Record, where: Place, folder: Path) -> Media:
    """The clip: `folder`/videos/{id}.mp4 between the two times of `meta.split`, or the whole file if that is null.

    Raises RecordError for a clip that is not as long as `meta.duration`, by which all times are scaled.
    """
    name = identifier(record, "id", where)
    meta = field(record, "meta", dict, where)
    clip = None
    if meta.get("split") is not None:
        clip = interval(meta["split"], "meta.split", where)
        if clip[0] == clip[1]:
            raise RecordError(f"{where}: field 'meta.split' is empty: it starts and ends at {clip[0]} s")
    duration = meta.get("duration") if is_number(meta.get("duration")) else None
    if clip is not None and duration is not None and durations_differ(clip[1] - clip[0], duration):
        raise RecordError(
            f"{where}: field 'meta.duration' is {duration:g} s, but 'meta.split' lasts {clip[1] - clip[0]:g} s"
        )
    return Media(f"{folder.name}/{name}", folder / "videos" / f"{name}.mp4", clip=clip, duration=duration)


def read_pite(record: Record, where: Place, folder: Path, *, num_frames: int, num_points: int) -> Sample:
    """All turns, with marks replaced by two-digit frame indices and tracks placed on `num_frames` frames.

    Marks are replaced in questions and answers, as VTimeLLM's loader does. A record without marks may lack `meta.token`.
    Tracks beyond the first `num_points` are not used. Raises RecordError with place and field for marks without a time,
    times outside the clip, phrases that are not at their `start`, and points that are not tracks.
    """
    meta = field(record, "meta", dict, where)
    duration = duration_of(meta, where)
    tokens = field(meta, "token", dict, where) if meta.get("token") is not None else {}
    indices = _indices(tokens, duration, num_frames, where)
    pairs = conversation(record, where)
    questions = [
        _question(question, indices, f"conversations[{2 * i}]", where) for i, (question, _) in enumerate(pairs)
    ]
    answers = [
        _Marked(answer, indices, Within(where, f"field 'conversations[{2 * i + 1}]'"))
        for i, (_, answer) in enumerate(pairs)
    ]
    mentions: list[list[Mention]] = [[] for _ in pairs]
    listed = field(record, "trajectories", list, where) if record.get("trajectories") is not None else []
    for i, trajectory in enumerate(listed):
        name = f"trajectories[{i}]"
        if not isinstance(trajectory, dict):
            raise RecordError(f"{where}: field '{name}' must be an object")
        inside = Within(where, name)
        turn = field(trajectory, "turn", int, inside)
        if not 0 <= turn < len(pairs):
            raise RecordError(f"{where}: field '{name}.turn' is {shown(turn)}, but there are {len(pairs)} answers")
        mentions[turn].append(_mention(trajectory, inside, answers[turn], duration, num_frames, num_points))
    turns = tuple(
        Turn(question, answer.text, tuple(found)) for question, answer, found in zip(questions, answers, mentions)
    )
    return Sample(identifier(record, "id", where), pite_media(record, where, folder).key, turns)


def _indices(tokens: Record, duration: float, num_frames: int, where: Place) -> dict[str, str]:
    times = {mark: seconds(value, f"meta.token.{mark}", where, duration) for mark, value in tokens.items()}
    for mark, start in times.items():
        end = times.get(f"<e{mark[2:]}", start) if mark.startswith("<s") else start
        if start > end:
            raise RecordError(f"{where}: field 'meta.token.{mark}': start {start} s comes after end {end} s")
    return {mark: f"{time_to_index(t, duration, num_frames):02d}" for mark, t in times.items()}


def _index_of(mark: str, indices: dict[str, str], where: Place) -> str:
    if mark not in indices:
        raise RecordError(f"{where}: mark {mark} has no time in 'meta.token'")
    return indices[mark]


def _question(written: str, indices: dict[str, str], name: str, where: Place) -> str:
    """A question for training: without media tag and marks."""
    inside = Within(where, f"field '{name}'")
    return _TIME_MARK.sub(lambda mark: _index_of(mark[0], indices, inside), question_of(written, name, where))


def _mention(
    trajectory: Record, where: Place, answer: _Marked, duration: float, num_frames: int, num_points: int
) -> Mention:
    phrase = field(trajectory, "phrase", str, where)
    start = field(trajectory, "start", int, where)
    if not phrase.strip() or start < 0 or answer.written[start : start + len(phrase)] != phrase:
        raise RecordError(
            f"{where}: phrase {shown(phrase)} is not at character {shown(start)} of its answer {shown(answer.written)}"
        )
    where = Within(where, f"phrase {shown(phrase)}")
    times = interval(field(trajectory, "times", list, where), "times", where, duration)
    try:
        tracks = validate_tracks(field(trajectory, "points", list, where), num_points)
    except TrackError as error:
        raise RecordError(f"{where}: {error}") from None
    placed = place_tracks(tracks, times, duration, num_frames)
    return Mention(answer.offset(start), answer.offset(start + len(phrase)), placed)


class _Marked:
    """An answer as written, and its `text` for training without marks; maps offsets from one to the other."""

    def __init__(self, written: str, indices: dict[str, str], where: Place) -> None:
        self.written = written
        self._edits: list[tuple[int, int]] = []  # (end in the written text, growth up to there)
        parts, end, growth = [], 0, 0
        for match in _MARK.finditer(written):
            replacement = _index_of(match["time"], indices, where) if match["time"] else ""
            parts += [written[end : match.start()], replacement]
            end = match.end()
            growth += len(replacement) - len(match[0])
            self._edits.append((end, growth))
        self.text = "".join(parts) + written[end:]
        if not self.text:
            raise RecordError(f"{where}: the answer is empty")

    def offset(self, written_offset: int) -> int:
        """Offset in `text` of a character of `written`. A removed character maps to the place where it was removed."""
        growth = max((edit for edit in self._edits if edit[0] <= written_offset), default=(0, 0))[1]
        return min(max(written_offset + growth, 0), len(self.text))
