"""The files of each step: one per video, written atomically, in formats that other tools can write.

    phrases/{id}.json         {"events": [{"sentence": "A dog runs.", "phrases": [{"phrase": "A dog", "start": 0}]}]}
    masks/{id}.json           {"events": [[{"size": [H, W], "counts": [...]}, null]]}, null where nothing was found
    tracks/{id}.safetensors   "{event}.{phrase}": (M, K, 2) float32, for each phrase that was tracked
    records/{id}.json         {"record": ..., "counts": ..., "trajectories": ...}: the line of the data set, counts of its
                              phrases, and how long and how far each trajectory was followed

Events are in the order of the captions, and phrases in the order of `phrases`. A mask is in COCO's uncompressed
run-length encoding: lengths of alternating runs of 0 and 1, columns first, beginning with 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dataloaders.files import file_written_atomically, write_atomically
from dataloaders.formats.activitynet import EventVideo
from dataloaders.formats.fields import field
from dataloaders.records import RecordError

Step = Literal["phrases", "masks", "tracks", "records"]
STEPS: tuple[Step, ...] = get_args(Step)


@dataclass(frozen=True)
class Phrase:
    """A noun phrase and the offset of its first character in its event's sentence."""

    text: str
    start: int


Phrases = list[list[Phrase]]
"""Phrases of each event of a video."""

Masks = list[list[np.ndarray | None]]
"""(H, W) bool for each event and phrase, in the event's first frame; None where the object was not found."""

Key = tuple[int, int]
"""Numbers of an event and of a phrase in it."""

Tracks = dict[Key, np.ndarray]
"""(M, K, 2) float32 by event and phrase: M points at K moments evenly spaced over the event, both ends included. x and
y are fractions of the frame, (-1, -1) where a point is absent. A phrase without an entry was not tracked."""


def step_path(work: Path, step: str, name: str) -> Path:
    return work / step / f"{name}{'.safetensors' if step == 'tracks' else '.json'}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises RecordError where the file holds no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise RecordError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise RecordError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content


def write_phrases(path: Path, video: EventVideo, phrases: Phrases) -> None:
    events = [
        {"sentence": event.sentence, "phrases": [{"phrase": p.text, "start": p.start} for p in found]}
        for event, found in zip(video.events, phrases, strict=True)
    ]
    write_json(path, {"events": events})


def read_phrases(path: Path, video: EventVideo) -> Phrases:
    """Raises RecordError where the sentences are not those of `video`, or a phrase is not at its `start`."""
    phrases: Phrases = []
    for i, (event, entry) in enumerate(zip(video.events, _events(path, len(video.events)))):
        where = f"{path}: events[{i}]"
        if not isinstance(entry, dict) or entry.get("sentence") != event.sentence:
            raise RecordError(f"{where}: field 'sentence' must be that of the captions, {event.sentence!r}")
        phrases.append([])
        for item in field(entry, "phrases", list, where):
            text, start = (item.get("phrase"), item.get("start")) if isinstance(item, dict) else (None, None)
            if (
                not isinstance(text, str)
                or not text
                or not isinstance(start, int)
                or event.sentence[start : start + len(text)] != text
            ):
                raise RecordError(f"{where}: phrase {text!r} is not at character {start} of {event.sentence!r}")
            phrases[-1].append(Phrase(text, start))
    return phrases


def write_masks(path: Path, masks: Masks) -> None:
    write_json(path, {"events": [[None if mask is None else encode_mask(mask) for mask in event] for event in masks]})


def read_masks(path: Path, phrases: Phrases) -> Masks:
    """Raises RecordError unless the file holds a mask or null for each phrase."""
    masks: Masks = []
    for i, (entry, found) in enumerate(zip(_events(path, len(phrases)), phrases)):
        if not isinstance(entry, list) or len(entry) != len(found):
            raise RecordError(f"{path}: events[{i}] must hold one mask or null for each of its {len(found)} phrases")
        masks.append(
            [None if mask is None else decode_mask(mask, f"{path}: events[{i}][{j}]") for j, mask in enumerate(entry)]
        )
    return masks


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask (H, W) bool in COCO's uncompressed run-length encoding."""
    flat = np.concatenate(([False], mask.astype(bool).ravel(order="F")))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *changes.tolist(), mask.size]).tolist()}


def decode_mask(encoded: Any, where: str) -> np.ndarray:
    """The inverse of `encode_mask`. Raises RecordError, naming `where`, for anything else."""
    try:
        height, width = encoded["size"]
        counts = np.asarray(encoded["counts"], dtype=np.int64)
        if counts.ndim != 1 or (counts < 0).any() or counts.sum() != height * width:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise RecordError(
            f"{where}: expected {{'size': [H, W], 'counts': [...]}} whose run lengths add up to H * W"
        ) from None
    ones = np.arange(len(counts)) % 2 == 1
    return np.repeat(ones, counts).reshape(height, width, order="F")


def write_tracks(path: Path, tracks: Tracks) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({f"{event}.{phrase}": points for (event, phrase), points in tracks.items()}))


def read_tracks(path: Path, phrases: Phrases) -> Tracks:
    """Raises RecordError for another kind of file, for tensors that belong to no phrase, and for other shapes."""
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise RecordError(f"{path}: not a safetensors file ({error})") from None
    known = {f"{i}.{j}": (i, j) for i, found in enumerate(phrases) for j in range(len(found))}
    tracks: Tracks = {}
    for name, points in arrays.items():
        if name not in known:
            raise RecordError(f"{path}: tensor {name!r} is not an '{{event}}.{{phrase}}' of this video")
        if points.ndim != 3 or points.shape[1] < 1 or points.shape[2] != 2 or points.dtype.kind != "f":
            raise RecordError(
                f"{path}: tensor {name!r} must be (M, K, 2) floating point, not {points.dtype} {points.shape}"
            )
        if not np.isfinite(points).all():
            raise RecordError(f"{path}: tensor {name!r} holds a number that is not finite; an absent point is (-1, -1)")
        tracks[known[name]] = points.astype(np.float32)
    return tracks


def join_records(paths: Iterable[Path], output: Path) -> list[tuple[dict[str, int], list[dict[str, Any]]]]:
    """Write the existing records of `paths` as one JSONL file, atomically; returns their counts and trajectories."""
    output.parent.mkdir(parents=True, exist_ok=True)
    found = []
    with file_written_atomically(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for path in paths:
            if path.exists():
                content = read_json(path)
                file.write(json.dumps(content["record"], ensure_ascii=False, separators=(",", ":")) + "\n")
                found.append((content["counts"], content["trajectories"]))
    return found


def _events(path: Path, count: int) -> list[Any]:
    events = field(read_json(path), "events", list, str(path))
    if len(events) != count:
        raise RecordError(f"{path}: field 'events' holds {len(events)} entries, but the captions {count} events")
    return list(events)
