"""Tracks by a video model from a local directory: SAM 2, SAM 3, its tracker alone, or EdgeTAM, which carry a mask along.

Such a model remembers an object, so it finds it again after it was hidden. Its masks are not points: each of up to 64
points keeps its place relative to the box of the mask, moved to the nearest pixel of the mask, and is absent where the
mask is empty. One frame per moment is looked at, and only the models' own memory is kept of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from dataloaders.annotation.models import check_type, load_model
from dataloaders.annotation.steps import Masks, Phrase, Phrases, Tracks
from dataloaders.annotation.tracking import Moments, frames_until
from dataloaders.records import ABSENT

KINDS = {"sam2_video": "Sam2Video", "sam3_tracker_video": "Sam3TrackerVideo", "edgetam_video": "EdgeTamVideo"}
"""`model_type` of a configuration -> prefix of its classes in transformers."""

POINTS = 64
_LEAST = 4
"""Most points of an object; pixels of the model's small mask below which the object is absent."""

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Mean and standard deviation of the colours, by the models' image processors: SAM 3 has halves."""


class VideoTracker:
    """Follows the objects of masks through the moments of their events: `tracker(path, moments, masks, phrases)`.

    device   where the model runs
    size     height and width that a frame is resized to
    colours  mean and standard deviation by which it is normalised
    """

    device: torch.device
    size: tuple[int, int]
    colours: tuple[tuple[float, ...], tuple[float, ...]]

    def advance(self, event: Event, frame: torch.Tensor, index: int) -> None:
        """Add the masks of an event's objects in its next frame (1, 3, h, w). In the first the given ones are true."""
        raise NotImplementedError

    def __call__(self, path: Path, moments: Sequence[Moments], masks: Masks, phrases: Phrases) -> Tracks:
        """Tracks of the objects of all masks. Raises DecodeError for a file that cannot be decoded."""
        events = self.carry(path, moments, masks, phrases)
        return {key: track for event in events for key, track in event.tracks().items()}

    @torch.inference_mode()
    def carry(self, path: Path, moments: Sequence[Moments], masks: Masks, phrases: Phrases) -> list[Event]:
        """The events with an object, with its mask at each moment in `carried`. Raises as a call."""
        events = [Event(i, *each) for i, each in enumerate(zip(moments, masks, phrases)) if objects(each[1])]
        wanted = {int(frame) for event in events for frame in event.moments.frames}
        for index, frame in frames_until(path, wanted):
            here = prepared(frame, self.size, self.colours, self.device)
            for event in events:
                if index in event.moments.frames:
                    self.advance(event, here, index)
        return events


class VideoSegmenter(VideoTracker):
    """A model of `KINDS` in Hugging Face's format, which carries masks and does not read the phrases.

    Reads safetensors only and runs no code from the directory. Raises ValueError if it holds another model.
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        kind = check_type(directory, KINDS)
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        self._session = getattr(module, f"{KINDS[kind]}InferenceSession")
        self.device = torch.device(device)
        self._model = load_model(getattr(module, f"{KINDS[kind]}Model"), directory, self.device)
        self.colours = HALVES if kind == "sam3_tracker_video" else _IMAGENET
        size = self._model.config.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def advance(self, event: Event, frame: torch.Tensor, index: int) -> None:
        if event.session is None:
            event.session = self._session(
                video_height=self.size[0], video_width=self.size[1], inference_device=self.device, dtype=frame.dtype
            )
            for j, mask in objects(event.masks):
                given = torch.from_numpy(mask).to(frame)[None, None]
                resized = interpolate(given, self.size, mode="bilinear", antialias=True)
                event.session.add_mask_inputs(event.session.obj_id_to_idx(j), 0, (resized >= 0.5).to(frame))
                event.session.obj_with_new_inputs.append(j)
        output = self._model(event.session, frame=frame)
        event.session.processed_frames[output.frame_idx] = frame.new_empty(0)  # Its features are in the memory.
        size = output.pred_masks.shape[-2:]
        for row, (j, mask) in enumerate(objects(event.masks)):
            first = output.frame_idx == 0
            event.add(j, index, shrunk(mask, size) if first else (output.pred_masks[row, 0] > 0).cpu().numpy())


def prepared(
    frame: np.ndarray, size: tuple[int, int], colours: tuple[tuple[float, ...], ...], device: torch.device
) -> torch.Tensor:
    """A frame (H, W, 3) as the models take it: (1, 3, h, w), resized without regard to its shape, and normalised."""
    pixels = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 255
    resized = interpolate(pixels, size, mode="bilinear", antialias=True)
    mean, deviation = (resized.new_tensor(each)[:, None, None] for each in colours)
    return (resized - mean) / deviation


def shrunk(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A mask (H, W) bool in another size (h, w)."""
    given = torch.from_numpy(mask)[None, None].float()
    return np.asarray(interpolate(given, tuple(size), mode="bilinear", antialias=True)[0, 0].numpy() >= 0.5)


@dataclass
class Event:
    """An event with its first masks (H, W): by phrase, the small masks (h, w) at its moments so far."""

    number: int
    moments: Moments
    masks: list[np.ndarray | None]
    phrases: list[Phrase]
    session: Any = None
    carried: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def add(self, j: int, index: int, mask: np.ndarray) -> None:
        """The mask of phrase j in frame `index`, once for each moment that shows it."""
        self.carried.setdefault(j, []).extend([mask] * int((self.moments.frames == index).sum()))

    def tracks(self) -> Tracks:
        found = {(self.number, j): points_in(masks) for j, masks in self.carried.items()}
        return {key: track for key, track in found.items() if track is not None}


def objects(masks: Sequence[np.ndarray | None]) -> list[tuple[int, np.ndarray]]:
    """The masks that are not empty, with the numbers of their phrases."""
    return [(j, mask) for j, mask in enumerate(masks) if mask is not None and mask.any()]


def points_in(masks: Sequence[np.ndarray]) -> np.ndarray | None:
    """Points (M, K, 2), fractions of the frame, in K masks (h, w) of an object; None where the first mask is empty.

    A point keeps its place relative to the mask's box, and is moved to the nearest pixel of the mask.
    """
    if masks[0].sum() < _LEAST:
        return None
    size = np.array(masks[0].shape[::-1])
    first = _pixels(masks[0])
    chosen = first[np.linspace(0, len(first) - 1, min(POINTS, len(first))).astype(int)]
    relative = (chosen - first.min(0)) / np.maximum(np.ptp(first, axis=0), 1)
    tracks = np.full((len(chosen), len(masks), 2), float(ABSENT), np.float32)
    for k, mask in enumerate(masks):
        if mask.sum() >= _LEAST:
            here = _pixels(mask)
            expected = here.min(0) + relative * np.ptp(here, axis=0)
            nearest = ((expected[:, None] - here[None]) ** 2).sum(-1).argmin(1)
            tracks[:, k] = (here[nearest] + 0.5) / size
    return tracks


def _pixels(mask: np.ndarray) -> np.ndarray:
    """x and y (n, 2) of a mask's pixels."""
    return np.argwhere(mask)[:, ::-1].astype(np.float32)
