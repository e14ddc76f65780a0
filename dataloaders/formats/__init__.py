"""Readers of the five data sets, and where their files stand in a data folder.

    DIR/stage1/*localized_narratives*.jsonl    DIR/stage1/images/{coco,flickr30k,ade20k,open_images}/{image_id}.jpg
    DIR/stage2/pite_143k.jsonl                 DIR/stage2/videos/{id}.mp4
    DIR/stage3/valley.json                     DIR/stage3/videos/{v_id}.mp4
    DIR/stage3/video_instruct.json             DIR/stage3/videos/{video_id}.mp4
    DIR/evaluation/activitynet_captions.json   DIR/evaluation/videos/{vid}.mp4
    DIR/evaluation/pite_143k.jsonl             DIR/evaluation/videos/{id}.mp4

A feature's key is its folder and its id, such as `stage2/v000001`; of a narrative also its sub-set, `stage1/coco/9`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dataloaders.formats.activitynet import Event, EventVideo, activitynet_media, read_activitynet
from dataloaders.formats.fields import Place
from dataloaders.formats.instructions import (
    TurnChoice,
    read_valley,
    read_video_instruct,
    valley_media,
    video_instruct_media,
)
from dataloaders.formats.narratives import NarrativeTiming, narrative_media, read_narrative
from dataloaders.formats.pite_143k import pite_media, read_pite
from dataloaders.formats.stream import Record, Where, iter_json, iter_raw, lone_surrogate, parse_json
from dataloaders.records import Media, RecordError, Sample

__all__ = [
    "SPLITS",
    "Event",
    "EventVideo",
    "Format",
    "NarrativeTiming",
    "Reading",
    "Record",
    "Split",
    "TurnChoice",
    "Where",
    "iter_json",
    "iter_media",
    "iter_raw",
    "lone_surrogate",
    "parse_json",
    "present_formats",
    "present_splits",
    "read_activitynet",
    "read_narrative",
    "read_pite",
    "read_valley",
    "read_video_instruct",
]

Split = Literal["stage1", "stage2", "stage3", "evaluation"]


@dataclass(frozen=True)
class Reading:
    """How records become samples.

    num_frames, num_points  N and P of the trajectories
    turn                    which turn of a Valley conversation is learned (`read_valley`)
    narrative_timing        how a narrative's utterances are found in its caption (`read_narrative`)
    """

    num_frames: int
    num_points: int
    turn: TurnChoice = "first"
    narrative_timing: NarrativeTiming = "words"


@dataclass(frozen=True)
class Format:
    """An annotation file by name, or by pattern, its reader, what of `Reading` that takes, and the media its records name."""

    file: str
    read: Callable[..., Any]
    media: Callable[[Record, Place, Path], Media]
    options: tuple[str, ...] = ()

    def sample(self, record: Record, where: Place, folder: Path, reading: Reading) -> Sample:
        """A record's sample; of the evaluation's formats there is none."""
        sample = self.read(record, where, folder, **{name: getattr(reading, name) for name in self.options})
        assert isinstance(sample, Sample)
        return sample


_PITE = Format("pite_143k.jsonl", read_pite, pite_media, ("num_frames", "num_points"))

SPLITS: dict[Split, tuple[Format, ...]] = {
    "stage1": (Format("*localized_narratives*.jsonl", read_narrative, narrative_media, ("narrative_timing",)),),
    "stage2": (_PITE,),
    "stage3": (
        Format("valley.json", read_valley, valley_media, ("turn",)),
        Format("video_instruct.json", read_video_instruct, video_instruct_media),
    ),
    "evaluation": (
        Format("activitynet_captions.json", read_activitynet, activitynet_media),
        _PITE,
    ),
}
"""Folders of a data directory and the annotation files that each may hold."""


def present_formats(data: Path, split: Split) -> tuple[Format, ...]:
    """The formats whose files exist in `data`/`split`, one per file. Raises ValueError, naming what is expected, where none."""
    if not data.is_dir():
        raise ValueError(f"{data}: no such data folder")
    present = _present(data / split, split)
    if not present:
        raise ValueError(f"{data / split} holds none of {', '.join(f.file for f in SPLITS[split])}")
    return present


def _present(folder: Path, split: Split) -> tuple[Format, ...]:
    return tuple(
        replace(f, file=path.name) for f in SPLITS[split] for path in sorted(folder.glob(f.file)) if path.is_file()
    )


def present_splits(data: Path) -> tuple[Split, ...]:
    """The splits of a data folder that hold annotations. Raises ValueError where none does."""
    splits = tuple(split for split in SPLITS if _present(data / split, split))
    if not splits:
        raise ValueError(f"{data} is no data folder: none of {', '.join(SPLITS)} in it holds a known annotation file")
    return splits


def iter_media(
    data: Path, splits: Iterable[Split], malformed: Callable[[RecordError], None] | None = None
) -> Iterator[Media]:
    """Everything that the annotations of `splits` name, each key once, in the order of the files.

    malformed  called with the error of a record that names no media, which is then passed over; without it the error is
               raised. Training counts such records against its own budget
    Raises RecordError where one key stands for two different files or clips, and for files that end too early.
    """
    seen: dict[str, Media] = {}
    passed_over = 0
    for split in splits:
        for kind in present_formats(data, split):
            path = data / split / kind.file
            for offset, text in iter_raw(path):
                # Of many malformed records the first one's line will do: to count it is to read the file.
                where = f"{path}, byte {offset}" if passed_over else Where(path, offset)
                try:
                    media = kind.media(parse_json(text, where), where, data / split)
                except RecordError as error:
                    if malformed is None:
                        raise
                    malformed(error)
                    passed_over += 1
                    continue
                known = seen.setdefault(media.key, media)
                if known is media:
                    yield media
                elif known != media:
                    raise RecordError(f"{where}: {media.key!r} names {media}, but {known} before")
