"""Readers of the data sets, and the place of their files in a data folder.

    DIR/stage1/*localized_narratives*.jsonl    DIR/stage1/images/{coco,flickr30k,ade20k,open_images}/{image_id}.jpg
    DIR/stage2/pite_143k.jsonl                 DIR/stage2/videos/{id}.mp4
    DIR/stage3/valley.json                     DIR/stage3/videos/{v_id}.mp4
    DIR/stage3/video_instruct.json             DIR/stage3/videos/{video_id}.mp4
    DIR/evaluation/activitynet_captions.json   DIR/evaluation/videos/{vid}.mp4
    DIR/evaluation/activitynet_captions_2.json (the second annotator), the same videos
    DIR/evaluation/pite_143k.jsonl             DIR/evaluation/videos/{id}.mp4
    DIR/evaluation/*_qa*.json                  DIR/evaluation/videos/...mp4 (`dataloaders.formats.questions`)

A split is one of the four folders. A feature's key is its split and its id, such as `stage2/v000001`. The key of a
narrative also contains its subset, such as `stage1/coco/9`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

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
from dataloaders.formats.questions import (
    activitynet_qa_media,
    activitynet_video,
    msrvtt_media,
    msrvtt_video,
    msvd_media,
    msvd_video,
    named_media,
    named_video,
)
from dataloaders.formats.reading import check_budget, read_all, read_each
from dataloaders.formats.stream import Record, Where, iter_json, iter_raw, lone_surrogate, parse_json
from dataloaders.records import Media, Sample

__all__ = [
    "SPLITS",
    "Event",
    "EventVideo",
    "Format",
    "NarrativeTiming",
    "Reading",
    "Record",
    "Split",
    "Stage",
    "TurnChoice",
    "Where",
    "check_budget",
    "iter_json",
    "iter_raw",
    "lone_surrogate",
    "parse_json",
    "present_formats",
    "present_splits",
    "read_activitynet",
    "read_all",
    "read_each",
    "read_narrative",
    "read_pite",
    "read_valley",
    "read_video_instruct",
    "split_of",
]

Stage = Literal[1, 2, 3]
Split = Literal["stage1", "stage2", "stage3", "evaluation"]


def split_of(stage: Stage) -> Split:
    """The split that a training stage reads."""
    return cast(Split, f"stage{stage}")


@dataclass(frozen=True)
class Reading:
    """Options of the readers.

    num_frames, num_points  N and P of the trajectories
    turn                    which turn of a Valley conversation becomes the sample (`read_valley`)
    narrative_timing        how a narrative's utterances are matched with its caption (`read_narrative`)
    """

    num_frames: int
    num_points: int
    turn: TurnChoice = "first"
    narrative_timing: NarrativeTiming = "words"


@dataclass(frozen=True)
class Format:
    """An annotation file.

    file     its name, or a pattern
    read     the reader of its records
    media    the function that returns the media of a record, without a look at the disk: a file of another suffix is
             found later (`fields.locate`)
    options  fields of `Reading` that the reader takes
    """

    file: str
    read: Callable[..., Any]
    media: Callable[[Record, Place, Path], Media]
    options: tuple[str, ...] = ()

    def sample(self, record: Record, where: Place, folder: Path, reading: Reading) -> Sample:
        """The sample of a record. Not for the formats of the evaluation, which have none."""
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
        Format("activitynet_captions_2.json", read_activitynet, activitynet_media),
        _PITE,
        Format("msvd_qa.json", msvd_video, msvd_media),
        Format("msrvtt_qa.json", msrvtt_video, msrvtt_media),
        Format("activitynet_qa_q.json", activitynet_video, activitynet_qa_media),
        Format("tgif_qa_q.json", named_video, named_media),
        *(Format(f"{name}_qa.json", named_video, named_media) for name in ("generic", "temporal", "consistency")),
    ),
}
"""The splits of a data folder and the annotation files that each may hold."""


def present_formats(data: Path, split: Split, files: Sequence[str] | None = None) -> tuple[Format, ...]:
    """The formats whose files exist in `data`/`split`, one per file. Raises ValueError if there are none.

    files  the formats to look for, by their `file`; None for all of the split
    """
    if not data.is_dir():
        raise ValueError(f"{data}: no such data folder")
    wanted = [f.file for f in SPLITS[split]] if files is None else list(files)
    present = _present(data / split, split, wanted)
    if not present:
        raise ValueError(f"{data / split} holds none of {', '.join(wanted)}")
    return present


def _present(folder: Path, split: Split, files: Sequence[str] | None = None) -> tuple[Format, ...]:
    wanted = [f for f in SPLITS[split] if files is None or f.file in files]
    return tuple(replace(f, file=path.name) for f in wanted for path in sorted(folder.glob(f.file)) if path.is_file())


def present_splits(data: Path) -> tuple[Split, ...]:
    """The splits of a data folder that hold annotations. Raises ValueError if none does."""
    splits = tuple(split for split in SPLITS if _present(data / split, split))
    if not splits:
        raise ValueError(f"{data} is no data folder: none of {', '.join(SPLITS)} in it holds a known annotation file")
    return splits
