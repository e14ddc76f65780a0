"""Instruction data of stage 3: Valley (conversations) and VideoInstruct100K (single questions)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dataloaders.formats.fields import Place, answer_of, conversation, field, identifier, question_of
from dataloaders.formats.stream import Record
from dataloaders.records import Media, RecordError, Sample, Turn

TurnChoice = Literal["first", "last"]


def valley_media(record: Record, where: Place, folder: Path) -> Media:
    """The video `folder`/videos/{v_id}.mp4; older files name it by `video`, with or without `.mp4`."""
    name = identifier(record, "v_id" if "v_id" in record else "video", where).removesuffix(".mp4")
    return _video(folder, name)


def read_valley(record: Record, where: Place, folder: Path, *, turn: TurnChoice = "first") -> Sample:
    """One turn of a conversation: later ones lean on what was said before, so the first stands best alone."""
    pairs = conversation(record, where)
    i = 0 if turn == "first" else len(pairs) - 1
    question, answer = pairs[i]
    media = valley_media(record, where, folder)
    return _sample(media, where, (question, f"conversations[{2 * i}]"), (answer, f"conversations[{2 * i + 1}]"))


def video_instruct_media(record: Record, where: Place, folder: Path) -> Media:
    """The video `folder`/videos/{video_id}.mp4."""
    return _video(folder, identifier(record, "video_id", where))


def read_video_instruct(record: Record, where: Place, folder: Path) -> Sample:
    """The question `q` and its answer `a`."""
    media = video_instruct_media(record, where, folder)
    return _sample(media, where, (field(record, "q", str, where), "q"), (field(record, "a", str, where), "a"))


def _video(folder: Path, name: str) -> Media:
    return Media(f"{folder.name}/{name}", folder / "videos" / f"{name}.mp4")


def _sample(media: Media, where: Place, question: tuple[str, str], answer: tuple[str, str]) -> Sample:
    asked = question_of(*question, where)
    if not asked:
        raise RecordError(f"{where}: field {question[1]!r}: the question is empty")
    return Sample(media.path.stem, media.key, (Turn(asked, answer_of(*answer, where)),))
