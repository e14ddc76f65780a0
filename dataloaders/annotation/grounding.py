"""Find a phrase's object in a frame: GroundingDINO's best box, and SAM's mask in it. Models are local directories.

PiTe used GLaMM, which is a separate code base. To use its masks or others, write the files of this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataloaders.annotation.boxes import filled
from dataloaders.annotation.models import Found, load_model, load_processor, model_type

BATCH = 8
"""Phrases per batch of the detector."""


class Grounding:
    """An open-vocabulary detector with an optional segmenter: `grounding(image, phrases)`.

    detector   directory of a GroundingDINO in Hugging Face's format
    segmenter  directory of a SAM; with None the mask is the whole box, background included
    threshold  minimum score of a box, from 0 to 1
    Reads safetensors only and runs no code from the directories. Raises ValueError if they hold other models.
    """

    def __init__(self, detector: Path, segmenter: Path | None, device: str = "cpu", threshold: float = 0.35) -> None:
        from transformers import AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection

        self.device, self.threshold = torch.device(device), threshold
        self._processor, self._detector = _load(AutoModelForZeroShotObjectDetection, detector, self.device)
        if not hasattr(self._processor, "post_process_grounded_object_detection"):
            raise ValueError(f"{detector}: a {self._detector.config.model_type}, where a GroundingDINO is needed")
        self._segmenter = None
        if segmenter is not None:
            self._sam_processor, self._segmenter = _load(AutoModelForMaskGeneration, segmenter, self.device)
            if self._segmenter.config.model_type != "sam":
                raise ValueError(f"{segmenter}: a {self._segmenter.config.model_type}, where a SAM is needed")

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, phrases: Sequence[str]) -> list[np.ndarray | None]:
        """A mask (H, W) bool for each phrase in an image (H, W, 3) uint8 RGB, or None where nothing was found."""
        boxes = [box for i in range(0, len(phrases), BATCH) for box in self._boxes(image, phrases[i : i + BATCH])]
        masks = iter(self._masks(image, [box for box in boxes if box is not None]))
        found = [None if box is None else next(masks) for box in boxes]
        return [mask if mask is not None and mask.any() else None for mask in found]

    @torch.inference_mode()
    def find_all(self, image: np.ndarray, phrases: Sequence[str]) -> list[list[Found]]:
        """Each phrase's boxes (4,), scores and masks (H, W) bool in an image; the masks are None without a segmenter."""
        limits = np.array(image.shape[1::-1] * 2)
        found = []
        for result in (r for i in range(0, len(phrases), BATCH) for r in self._results(image, phrases[i : i + BATCH])):
            boxes = list(result["boxes"].float().cpu().numpy().clip(0, limits))
            masks = self._masks(image, boxes) if self._segmenter is not None else [None] * len(boxes)
            found.append(list(zip(boxes, result["scores"].tolist(), masks)))
        return found

    def _boxes(self, image: np.ndarray, phrases: Sequence[str]) -> list[np.ndarray | None]:
        """The best box [x0, y0, x1, y1] in pixels for each phrase, at the threshold or above."""
        results, limits = self._results(image, phrases), np.array(image.shape[1::-1] * 2)
        best = [r["boxes"][r["scores"].argmax()] if len(r["scores"]) else None for r in results]
        return [None if box is None else box.float().cpu().numpy().clip(0, limits) for box in best]

    def _results(self, image: np.ndarray, phrases: Sequence[str]) -> Any:
        """Boxes and scores of each phrase, at the threshold or above."""
        # The detector was trained on lower case and on full stops between phrases.
        texts = [f"{phrase.lower().rstrip(' .')}." for phrase in phrases]
        inputs = self._processor(images=[image] * len(texts), text=texts, return_tensors="pt", padding=True)
        inputs = inputs.to(self.device)
        return self._processor.post_process_grounded_object_detection(
            self._detector(**inputs),
            inputs["input_ids"],
            threshold=self.threshold,
            target_sizes=[image.shape[:2]] * len(texts),
        )

    def _masks(self, image: np.ndarray, boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        if not boxes:
            return []
        if self._segmenter is None:
            return [filled(box, image.shape) for box in boxes]
        given = [[box.tolist() for box in boxes]]
        inputs = self._sam_processor(images=image, input_boxes=given, return_tensors="pt")
        outputs = self._segmenter(
            pixel_values=inputs["pixel_values"].to(self.device),
            input_boxes=inputs["input_boxes"].float().to(self.device),
            multimask_output=False,
        )
        masks = self._sam_processor.image_processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        return list(masks[0][:, 0].numpy())


def _load(kind: Any, directory: Path, device: torch.device) -> tuple[Any, Any]:
    """Load a processor and a model. Raises ValueError with the first sentence of the library's message if it cannot."""
    from transformers import AutoProcessor

    model_type(directory)
    return load_processor(AutoProcessor, directory), load_model(kind, directory, device)
