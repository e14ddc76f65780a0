"""SAM 3 from a local directory: a phrase in a picture to masks, and phrases in a clip to masks with identities.

`Sam3Detector` makes the masks of an event's first frame, as `Grounding` does. `Sam3Tracker` looks for the phrases in the
frame of every moment and carries what it found along, so an object is the same one after it was hidden, and a mask that
drifts is corrected by the detector. Both read one copy of the weights. The tracker encodes a frame once for each event,
because transformers' SAM 3 takes no features. transformers would fetch code for two operations on masks from the hub;
they are computed here instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from dataloaders.annotation.models import check_type, load_model, load_processor
from dataloaders.annotation.steps import Phrase
from dataloaders.annotation.tracking import opencv
from dataloaders.annotation.video_masks import HALVES, Event, VideoTracker, forget, objects, prepared, resized_mask

KINDS = ("sam3_video", "sam3")
"""`model_type` of SAM 3 as it is published, and of its detector alone."""

_SAME = 0.5
"""IoU of a given mask and of what SAM 3 finds in the first frame, above which both are the same object."""


class Sam3Detector:
    """The detector of a SAM 3, with the interface of `Grounding`. Raises ValueError if the directory holds another model.

    threshold  minimum score of a mask, from 0 to 1
    """

    def __init__(self, directory: Path, device: str = "cpu", threshold: float = 0.35) -> None:
        kind = check_type(directory, KINDS)
        model, self._tokenizer = _load(directory, device, kind)
        self._model = model.detector_model if kind == KINDS[0] else model
        self._device, self._threshold = torch.device(device), threshold

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, phrases: Sequence[str]) -> list[np.ndarray | None]:
        """A mask (H, W) bool for each phrase in an image (H, W, 3) uint8 RGB, or None where nothing was found."""
        best = [max(found, key=lambda each: each[1]) if found else None for found in self.find_all(image, phrases)]
        return [each[2] if each is not None and each[2].any() else None for each in best]

    @torch.inference_mode()
    def find_all(self, image: np.ndarray, phrases: Sequence[str]) -> list[list[tuple[np.ndarray, float, np.ndarray]]]:
        """Each phrase's boxes (4,) in pixels, scores and masks (H, W) bool in an image."""
        size = torch.tensor(image.shape[1::-1] * 2)
        found = []
        for scores, boxes, logits in self._results(image, phrases):
            masks = interpolate(logits[None], image.shape[:2], mode="bilinear")[0] > 0 if len(logits) else logits
            corners = (boxes.cpu().clip(0, 1) * size).numpy()
            found.append(list(zip(corners, scores.tolist(), masks.cpu().numpy())))
        return found

    def _results(self, image: np.ndarray, phrases: Sequence[str]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Scores (n,), boxes (n, 4) as fractions and masks' logits (n, h, w) of each phrase, from the threshold up."""
        if not phrases:
            return
        frame = prepared(image, _size(self._model.config.image_size), HALVES, self._device)
        seen = self._model.get_vision_features(pixel_values=frame)
        for phrase in phrases:
            output = self._model(vision_embeds=seen, **_tokens(self._tokenizer, phrase, self._model, self._device))
            scores = (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0]
            kept = scores >= self._threshold
            yield scores[kept], output.pred_boxes[0, kept], output.pred_masks[0, kept]


@dataclass
class _Clip:
    """A session of transformers, and by phrase the object in it that is meant."""

    session: Any
    meant: dict[int, int | None] = field(default_factory=dict)


class Sam3Tracker(VideoTracker):
    """Phrases and a clip to masks with identities. Raises ValueError if the directory holds no SAM 3 for videos.

    Which of the objects of a phrase is meant follows from the given mask in the event's first frame.
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self._model, self._tokenizer = _load(directory, device, check_type(directory, KINDS[:1]))
        self.device, self.colours, self.size = torch.device(device), HALVES, _size(self._model.config.image_size)

    def advance(self, event: Event, frame: torch.Tensor, index: int) -> None:
        first = event.session is None
        if first:
            event.session = _Clip(self._session([event.phrases[j] for j, _ in objects(event.masks)], frame))
        session, meant = event.session.session, event.session.meant
        number = session.add_new_frame(frame)
        with _mask_operations():
            output = self._model(session, frame_idx=number)
        session.processed_frames[number] = frame.new_empty(0)
        forget(session, self._model.tracker_model)
        # SAM 3 withdraws an object that its detector does not confirm soon after the start.
        hidden = output.removed_obj_ids | output.suppressed_obj_ids
        found = {
            each: (mask[0] > 0).cpu().numpy() for each, mask in output.obj_id_to_mask.items() if each not in hidden
        }
        size = (self._model.low_res_mask_size,) * 2
        for j, given in objects(event.masks):
            if first:
                given = resized_mask(given, size)
                prompt = session.add_prompt(event.phrases[j].text)
                own = {each: mask for each, mask in found.items() if session.obj_id_to_prompt_id[each] == prompt}
                meant[j] = _most_alike(own, given)
                event.add(j, index, given)
            else:
                event.add(j, index, found.get(meant[j], np.zeros(size, bool)))

    def _session(self, phrases: Sequence[Phrase], frame: torch.Tensor) -> Any:
        from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

        session = Sam3VideoInferenceSession(
            inference_device=self.device,
            inference_state_device=self.device,
            video_storage_device=self.device,
            dtype=frame.dtype,
        )
        for phrase in phrases:
            tokens = _tokens(self._tokenizer, phrase.text, self._model.detector_model, self.device)
            prompt = session.add_prompt(phrase.text)
            session.prompt_input_ids[prompt] = tokens["input_ids"]
            session.prompt_attention_masks[prompt] = tokens["attention_mask"]
        return session


def _most_alike(masks: dict[int, np.ndarray], given: np.ndarray) -> int | None:
    """The object whose mask is most like a given one; None where none is the same object."""
    ious = {each: (mask & given).sum() / max((mask | given).sum(), 1) for each, mask in masks.items()}
    best = max(ious, key=lambda each: ious[each], default=None)
    return best if best is not None and ious[best] >= _SAME else None


def _size(side: int | Sequence[int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _tokens(tokenizer: Any, phrase: str, detector: Any, device: torch.device) -> dict[str, torch.Tensor]:
    length = detector.config.text_config.max_position_embeddings
    found = tokenizer(phrase, return_tensors="pt", padding="max_length", max_length=length, truncation=True)
    return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}


@lru_cache(1)
def _load(directory: Path, device: str, kind: str) -> tuple[Any, Any]:
    """The model of a kind and its tokenizer; the detector and the tracker of one directory share them."""
    from transformers import AutoTokenizer, Sam3Model, Sam3VideoModel

    model = load_model(Sam3VideoModel if kind == KINDS[0] else Sam3Model, directory, torch.device(device))
    return model, load_processor(AutoTokenizer, directory)


@contextmanager
def _mask_operations() -> Iterator[None]:
    """Lets transformers' SAM 3 take its operations on masks from `_MaskOperations`."""
    from transformers.models.sam3_video import modeling_sam3_video

    before = modeling_sam3_video.cv_utils_kernel
    modeling_sam3_video.cv_utils_kernel = _MaskOperations()
    try:
        yield
    finally:
        modeling_sam3_video.cv_utils_kernel = before


class _MaskOperations:
    """What transformers' SAM 3 takes from `kernels-community/cv-utils` of the hub where it can."""

    @staticmethod
    def generic_nms(ious: torch.Tensor, scores: torch.Tensor, threshold: float, use_iou_matrix: bool) -> torch.Tensor:
        """Non-maximum suppression: indices of the kept ones of n objects, from their IoUs (n, n) and scores (n,)."""
        assert use_iou_matrix, "SAM 3 gives a matrix"
        kept: list[int] = []
        for i in scores.argsort(descending=True, stable=True).tolist():
            if not kept or float(ious[i, kept].max()) <= threshold:
                kept.append(i)
        return torch.tensor(kept, device=ious.device)

    @staticmethod
    def cc_2d(masks: torch.Tensor, get_counts: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The connected component of each pixel of masks (n, 1, h, w) uint8, and that component's number of pixels."""
        assert get_counts, "SAM 3 needs them"
        cv2 = opencv()
        labels, counts = np.zeros(masks.shape, np.int32), np.zeros(masks.shape, np.int32)
        for mask, label, count in zip(masks[:, 0].cpu().numpy(), labels[:, 0], counts[:, 0]):
            _, label[:], statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            count[:] = np.where(label > 0, statistics[label, cv2.CC_STAT_AREA], 0)
        return torch.from_numpy(labels).to(masks.device), torch.from_numpy(counts).to(masks.device)
