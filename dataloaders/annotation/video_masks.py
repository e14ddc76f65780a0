"""Tracks by a video model from a local directory: SAM 2, SAM 3, its tracker alone, or EdgeTAM, which carry a mask along.

Such a model remembers an object, so it finds it again after it was hidden. Its masks are not points: each of up to 64
points keeps its place relative to the box of the mask, moved to the nearest pixel of the mask, and is absent where the
mask is empty. One frame per moment is looked at, and only the models' own memory is kept of it: transformers' sessions
keep all outputs of all frames, so `forget` drops what later frames do not read. A frame is encoded once for all events.
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
from dataloaders.annotation.tracking import Check, Moments, frames_until, go_on
from dataloaders.records import ABSENT

KINDS = {"sam2_video": "Sam2Video", "sam3_tracker_video": "Sam3TrackerVideo", "edgetam_video": "EdgeTamVideo"}
"""`model_type` of a configuration -> prefix of its classes in transformers."""

POINTS = 64
_LEAST = 4
"""Most points of an object; pixels of the model's small mask below which the object is absent."""

_FEATURES = {"maskmem_features", "maskmem_pos_enc"}
"""What a frame's memory is made of in a session, besides its object pointer."""

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

    def encode(self, frame: torch.Tensor) -> Any:
        """What `advance` takes of a frame (1, 3, h, w), computed once for all events: here the frame itself."""
        return frame

    def advance(self, event: Event, frame: Any, index: int) -> None:
        """Add the masks of an event's objects in its next frame, from `encode`. In the first the given ones are true."""
        raise NotImplementedError

    def __call__(self, path: Path, moments: Sequence[Moments], masks: Masks, phrases: Phrases) -> Tracks:
        """Tracks of the objects of all masks. Raises DecodeError for a file that cannot be decoded."""
        events = self.carry(path, moments, masks, phrases)
        return {key: track for event in events for key, track in event.tracks().items()}

    @torch.inference_mode()
    def carry(
        self, path: Path, moments: Sequence[Moments], masks: Masks, phrases: Phrases, check: Check = go_on
    ) -> list[Event]:
        """The events with an object, with its mask at each moment in `carried`. Raises as `frames_until`."""
        events = [Event(i, *each) for i, each in enumerate(zip(moments, masks, phrases)) if objects(each[1])]
        wanted = {int(frame) for event in events for frame in event.moments.frames}
        for index, frame in frames_until(path, wanted, check):
            encoded = self.encode(prepared(frame, self.size, self.colours, self.device))
            for event in events:
                if index in event.moments.frames:
                    self.advance(event, encoded, index)
                if index == event.moments.last:
                    event.session = None
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

    def encode(self, frame: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """The features of a frame, by the names under which a session caches them."""
        seen = self._model.get_image_features(frame, return_dict=True)
        return {"vision_feats": seen.fpn_hidden_states, "vision_pos_embeds": seen.fpn_position_encoding}

    def advance(self, event: Event, frame: dict[str, list[torch.Tensor]], index: int) -> None:
        if event.session is None:
            event.session = self._session(
                video_height=self.size[0],
                video_width=self.size[1],
                inference_device=self.device,
                inference_state_device=self.device,
                dtype=torch.float32,
            )
            for j, mask in objects(event.masks):
                given = torch.from_numpy(mask).to(self.device)[None, None].float()
                resized = interpolate(given, self.size, mode="bilinear", antialias=True)
                event.session.add_mask_inputs(event.session.obj_id_to_idx(j), 0, (resized >= 0.5).float())
                event.session.obj_with_new_inputs.append(j)
        event.session.cache.cache_vision_features(event.session.num_frames or 0, frame)
        output = self._model(event.session, frame=torch.empty(0))  # Only its features are read.
        forget(event.session, self._model)
        size = output.pred_masks.shape[-2:]
        for row, (j, mask) in enumerate(objects(event.masks)):
            first = output.frame_idx == 0
            event.add(j, index, resized_mask(mask, size) if first else (output.pred_masks[row, 0] > 0).cpu().numpy())


def forget(session: Any, model: Any) -> None:
    """Drop what a SAM 2, EdgeTAM or SAM 3 tracker does not read in later frames. Their masks stay the same, bit by bit.

    session  of transformers, after a frame
    It reads the features of the last frames and of the given masks, and the pointers of these and of more frames.
    """
    now, config = session.num_frames, model.config
    featured = now - config.num_maskmem
    pointed = now - max(config.num_maskmem, config.max_object_pointers_in_encoder)
    for outputs in session.output_dict_per_obj.values():
        given, tracked = outputs["cond_frame_outputs"], outputs["non_cond_frame_outputs"]
        for frame in [frame for frame in tracked if frame <= pointed]:
            del tracked[frame]
        closest = sorted(given)[-config.max_cond_frame_num :] if config.max_cond_frame_num > 0 else list(given)
        for frame, output in (*given.items(), *tracked.items()):
            kept = _FEATURES if frame > featured or frame in closest else set()
            for name in output.keys() - kept - {"object_pointer"}:
                del output[name]
    for masks in session.mask_inputs_per_obj.values():
        masks.clear()


def prepared(
    frame: np.ndarray, size: tuple[int, int], colours: tuple[tuple[float, ...], ...], device: torch.device
) -> torch.Tensor:
    """A frame (H, W, 3) as the models take it: (1, 3, h, w), resized without regard to its shape, and normalised."""
    pixels = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 255
    resized = interpolate(pixels, size, mode="bilinear", antialias=True)
    mean, deviation = (resized.new_tensor(each)[:, None, None] for each in colours)
    return (resized - mean) / deviation


def resized_mask(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
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
