"""Tracks by a video segmenter from a local directory: SAM 2, SAM 3's tracker or EdgeTAM, which carry a mask along.

Such a model remembers an object, so it finds it again after it was hidden. Its masks are not points: each of up to 64
points keeps its place relative to the box of the mask, moved to the nearest pixel of the mask, and is absent where the
mask is empty. One frame per moment is looked at, and only the models' own memory is kept of it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from dataloaders.annotation.steps import Masks, Tracks
from dataloaders.annotation.tracking import Moments
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.video import iter_frames
from dataloaders.errors import reason
from dataloaders.records import ABSENT

KINDS = {"sam2_video": "Sam2Video", "sam3_tracker_video": "Sam3TrackerVideo", "edgetam_video": "EdgeTamVideo"}
"""`model_type` of a configuration -> prefix of its classes in transformers."""

POINTS = 64
_LEAST = 4
"""Most points of an object; pixels of the model's small mask below which the object is absent."""

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Mean and standard deviation of the colours, by the models' image processors: SAM 3 has halves."""


class VideoSegmenter:
    """A video segmenter in Hugging Face's format: `segmenter(path, moments, masks)`.

    Reads safetensors only and runs no code from the directory. Raises ValueError if it holds another model.
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory}: not a model directory in Hugging Face's format: it holds no config.json")
        kind = json.loads((directory / "config.json").read_bytes()).get("model_type")
        if kind not in KINDS:
            raise ValueError(f"{directory}: a {kind}, where one of {', '.join(KINDS)} is needed")
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        self._session = getattr(module, f"{KINDS[kind]}InferenceSession")
        self.device = torch.device(device)
        try:
            model = getattr(module, f"{KINDS[kind]}Model").from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(f"{directory}: cannot be loaded: {reason(error)}") from None
        self._model = model.to(self.device).eval()
        self._colours = _HALVES if kind == "sam3_tracker_video" else _IMAGENET
        size = self._model.config.image_size
        self._size = (size, size) if isinstance(size, int) else tuple(size)

    @torch.inference_mode()
    def __call__(self, path: Path, moments: Sequence[Moments], masks: Masks) -> Tracks:
        """Tracks of the objects of all masks. Raises DecodeError for a file that cannot be decoded."""
        events = [_Event(i, m, found) for i, (m, found) in enumerate(zip(moments, masks)) if _objects(found)]
        wanted = {int(frame) for event in events for frame in event.moments.frames}
        last = max(wanted, default=-1)
        for index, frame in enumerate(iter_frames(path, wanted) if wanted else ()):
            if frame is not None:
                here = self._prepared(frame)
                for event in events:
                    if index in event.moments.frames:
                        self._advance(event, here, index)
            if index == last:
                return {key: track for event in events for key, track in event.tracks().items()}
        if not wanted:
            return {}
        raise DecodeError(f"{path}: ends before frame {last}, which its packets promise")

    def _prepared(self, frame: np.ndarray) -> torch.Tensor:
        """A frame (H, W, 3) as the models take it: (1, 3, h, w), resized to a square and normalised."""
        pixels = torch.from_numpy(frame).to(self.device).permute(2, 0, 1)[None].float() / 255
        resized = interpolate(pixels, self._size, mode="bilinear", antialias=True)
        mean, deviation = (resized.new_tensor(each)[:, None, None] for each in self._colours)
        return (resized - mean) / deviation

    def _advance(self, event: _Event, frame: torch.Tensor, index: int) -> None:
        """Carry the masks of an event to its next moment. In the first the given masks are the truth."""
        if event.session is None:
            event.session = self._session(
                video_height=self._size[0], video_width=self._size[1], inference_device=self.device, dtype=frame.dtype
            )
            for j, mask in _objects(event.masks):
                given = torch.from_numpy(mask).to(frame)[None, None]
                resized = interpolate(given, self._size, mode="bilinear", antialias=True)
                event.session.add_mask_inputs(event.session.obj_id_to_idx(j), 0, (resized >= 0.5).to(frame))
                event.session.obj_with_new_inputs.append(j)
        output = self._model(event.session, frame=frame)
        event.session.processed_frames[output.frame_idx] = frame.new_empty(0)  # Its features are in the memory.
        size = output.pred_masks.shape[-2:]
        for row, (j, mask) in enumerate(_objects(event.masks)):
            carried = output.pred_masks[row, 0] > 0
            if output.frame_idx == 0:
                given = torch.from_numpy(mask)[None, None].float()
                carried = interpolate(given, size, mode="bilinear", antialias=True)[0, 0] >= 0.5
            repeats = int((event.moments.frames == index).sum())
            event.carried.setdefault(j, []).extend([carried.cpu().numpy()] * repeats)


@dataclass
class _Event:
    """An event with its masks: by phrase, the small masks (h, w) at its moments so far."""

    number: int
    moments: Moments
    masks: list[np.ndarray | None]
    session: Any = None
    carried: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def tracks(self) -> Tracks:
        found = {(self.number, j): points_in(masks) for j, masks in self.carried.items()}
        return {key: track for key, track in found.items() if track is not None}


def _objects(masks: Sequence[np.ndarray | None]) -> list[tuple[int, np.ndarray]]:
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
