"""Ground truth of spatial grounding: one box in each frame of the interval that a question is about.

    VidSTG   {split}_annotations.json, a list of {vid, fps, width, height, temporal_gt, questions, ...}, whose boxes are
             those of VidOR: {vid}.json in a folder, or in folders of it
    HC-STVG  train.json and test.json of version 1, train_v2.json and val_v2.json of version 2:
             {NAME.mp4: {bbox, st_frame, img_num, caption or English, width and height or img_size}}

The two sets count frames differently. VidSTG's begin_fid is the first frame, from 0, and its end_fid the frame after
the last. HC-STVG's st_frame counts from 1; the published evaluation of PG-Video-LLaVA takes it as an index from 0, so
each box is compared with the next frame.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.formats.fields import Record, field, is_number, shown
from dataloaders.records import RecordError
from pite.evaluate.protocols import Protocol

HC_STVG_SECONDS = 20
"""Seconds of each video of HC-STVG, by which its frame rate is known."""


@dataclass(frozen=True, eq=False)
class Tube:
    """A question and the true box of what it is about.

    video     name of the video's file without its suffix
    query_id  number of the question in the published order
    question  as it is put to a model
    size      width and height that the boxes count, in pixels
    fps       frames per second
    span      first frame of the interval, and the frame after its last
    boxes     (4,) left, top, right, bottom by frame; a frame of the interval may have none
    answered  whether the published evaluation has a question about it
    """

    video: str
    query_id: int
    question: str
    size: tuple[int, int]
    fps: float
    span: tuple[int, int]
    boxes: Mapping[int, np.ndarray]
    answered: bool = True


def read_vidstg(annotations: Path, vidor: Path) -> list[Tube]:
    """The interrogative questions of VidSTG, numbered as published: declarative sentences count, but are left out.

    vidor  folder of VidOR's annotations: its `validation` for the test split, else its `training`
    Raises ValueError, naming file and field.
    """
    records = _load(annotations)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{annotations}: expected a list of objects with vid, temporal_gt and questions")
    files = {file.stem: file for file in sorted(vidor.rglob("*.json"))}
    of_video: dict[str, list[tuple[int, Record, Record, str]]] = {}
    number = 0
    for i, record in enumerate(records):
        where = f"{annotations}: record {i}"
        video = str(field(_object(record, where), "vid", (str, int), where))
        if video not in files:
            raise ValueError(f"{where}: {vidor} holds no {video}.json, the boxes of VidOR")
        questions = field(record, "questions", list, where)
        entries = ((number + j, record, _object(each, where), where) for j, each in enumerate(questions))
        of_video.setdefault(video, []).extend(entries)
        number += len(questions) + len(field(record, "captions", list, where))
    tubes = [tube for video, entries in of_video.items() for tube in _vidstg_tubes(video, entries, files[video])]
    return sorted(tubes, key=lambda tube: tube.query_id)


def _vidstg_tubes(video: str, entries: list[tuple[int, Record, Record, str]], file: Path) -> Iterator[Tube]:
    """The questions about one video, whose file is read once."""
    boxes = _vidor(file, {field(question, "target_id", int, where) for _, _, question, where in entries})
    for number, record, question, where in entries:
        yield _vidstg_tube(video, number, record, question, boxes, where)


def _vidstg_tube(
    video: str, query_id: int, record: Record, question: Record, boxes: dict[int, dict[int, np.ndarray]], where: str
) -> Tube:
    truth = _object(field(record, "temporal_gt", dict, where), where)
    span = field(truth, "begin_fid", int, where), field(truth, "end_fid", int, where)
    target = field(question, "target_id", int, where)
    own = {frame: box for frame, box in boxes.get(target, {}).items() if span[0] <= frame < span[1]}
    if not own:
        raise ValueError(f"{where}: VidOR has no box of target {target} in frames {span[0]} to {span[1] - 1}")
    size = field(record, "width", int, where), field(record, "height", int, where)
    text = field(question, "description", str, where)
    return Tube(video, query_id, text, size, _rate(record, "fps", where), span, own)


def _vidor(path: Path, targets: set[int]) -> dict[int, dict[int, np.ndarray]]:
    """Boxes of some targets in a file of VidOR, by target and frame."""
    found: dict[int, dict[int, np.ndarray]] = {target: {} for target in targets}
    for frame, boxes in enumerate(field(_object(_load(path), str(path)), "trajectories", list, str(path))):
        where = f"{path}: trajectories[{frame}]"
        for box in boxes:
            target = field(_object(box, where), "tid", int, where)
            if target in targets:
                edges = field(box, "bbox", dict, where)
                numbers = [field(edges, name, (int, float), where) for name in ("xmin", "ymin", "xmax", "ymax")]
                found[target][frame] = np.array(numbers, np.float64)
    return found


def read_hc_stvg(annotations: Path, questions: Path | None = None, protocol: Protocol = "strict") -> list[Tube]:
    """The videos of HC-STVG, numbered in the file's order.

    questions  folder of {number}.json with "Q" and "A", made of the captions; a video without one is `answered` False.
               Without a folder the captions are the questions
    Raises ValueError, naming file, video and field.
    """
    records = _load(annotations)
    if not isinstance(records, dict) or not records:
        raise ValueError(f"{annotations}: expected an object {{NAME.mp4: {{bbox, st_frame, img_num, ...}}}}")
    return [
        _hc_stvg_tube(Path(name).stem, i, _object(record, where), questions, protocol, where)
        for i, (name, record) in enumerate(records.items())
        for where in [f"{annotations}: video {name!r}"]
    ]


def _hc_stvg_tube(
    video: str, number: int, record: Record, questions: Path | None, protocol: Protocol, where: str
) -> Tube:
    first = field(record, "st_frame", int, where) - (protocol == "strict")
    listed = [_numbers(box, 4, f"{where}: bbox[{i}]") for i, box in enumerate(field(record, "bbox", list, where))]
    if not listed:
        raise ValueError(f"{where}: field 'bbox' is empty")
    corners = [np.array([x, y, x + width, y + height], np.float64) for x, y, width, height in listed]
    if "img_size" in record:
        height, width = _numbers(record["img_size"], 2, f"{where}: img_size")
    else:
        width, height = field(record, "width", int, where), field(record, "height", int, where)
    text = field(record, "English" if "English" in record else "caption", str, where)
    query = _question(questions / f"{number}.json") if questions is not None else text
    return Tube(
        video=video,
        query_id=number,
        question=query or text,
        size=(int(width), int(height)),
        fps=_rate(record, "img_num", where) / HC_STVG_SECONDS,
        span=(first, first + len(corners)),
        boxes=dict(enumerate(corners, first)),
        answered=query is not None,
    )


def _question(path: Path) -> str | None:
    if not path.is_file():
        return None
    return str(field(_object(_load(path), str(path)), "Q", str, str(path)))


def sampled(tube: Tube, rate: float = 5, most: int = 100) -> list[int]:
    """Frames of a tube that the published evaluation looks at: `rate` a second, at most `most`, evenly by number."""
    share, (first, end) = rate / tube.fps, tube.span
    frames = [first]
    for frame in range(first, end):
        if int(frames[-1] * share) < int(frame * share):
            frames.append(frame)
    if len(frames) > most:
        frames = [frames[j * len(frames) // most] for j in range(most)]
    return frames


def _load(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    return content


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected an object, not {type(value).__name__}")
    return value


def _rate(record: Record, name: str, where: str) -> float:
    value = field(record, name, (int, float), where)
    if not is_number(value) or value <= 0:
        raise RecordError(f"{where}: field {name!r} must be more than 0, not {shown(value)}")
    return float(value)


def _numbers(value: Any, count: int, where: str) -> list[float]:
    if not isinstance(value, list) or len(value) != count or not all(map(is_number, value)):
        raise RecordError(f"{where}: expected {count} numbers, not {shown(value)}")
    return value


def scored(tube: Tube, protocol: Protocol) -> Iterator[tuple[int, np.ndarray]]:
    """Frames that count, with their boxes: each annotated one, or with `published` those of `sampled`."""
    frames = sampled(tube) if protocol == "published" else sorted(tube.boxes)
    for frame in frames:
        if frame in tube.boxes:
            yield frame, tube.boxes[frame]
