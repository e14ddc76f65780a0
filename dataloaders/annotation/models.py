"""What detectors and trackers do, and how a model is loaded from a local directory in Hugging Face's format.

Only safetensors are read, no code from a directory is run, and nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dataloaders.annotation.steps import Masks, Phrases, Tracks
from dataloaders.annotation.tracking import Moments
from dataloaders.errors import reason

if TYPE_CHECKING:
    import torch

Found = tuple[np.ndarray, float, np.ndarray | None]
"""Box (4,) in pixels, score and mask (H, W) bool; None for a detector without masks."""


class Detector(Protocol):
    """Finds phrases in an image (H, W, 3) uint8 RGB."""

    def __call__(self, image: np.ndarray, phrases: Sequence[str]) -> list[np.ndarray | None]:
        """The best mask (H, W) bool of each phrase, or None where nothing was found."""
        ...

    def find_all(self, image: np.ndarray, phrases: Sequence[str]) -> Sequence[Sequence[Found]]:
        """Everything that each phrase may mean."""
        ...


class Tracker(Protocol):
    """Follows the objects of masks in their events' first frames through all moments."""

    def __call__(self, path: Path, moments: Sequence[Moments], masks: Masks, phrases: Phrases) -> Tracks: ...


def model_type(directory: Path) -> str:
    """Raises ValueError for a directory that holds no model."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: not a model directory in Hugging Face's format: it holds no config.json")
    return str(json.loads((directory / "config.json").read_bytes()).get("model_type"))


def check_type(directory: Path, kinds: Iterable[str]) -> str:
    """`model_type`. Raises ValueError unless it is one of `kinds`."""
    if (kind := model_type(directory)) not in kinds:
        raise ValueError(f"{directory}: a {kind}, where one of {', '.join(kinds)} is needed")
    return kind


def load_model(model: Any, directory: Path, device: torch.device) -> Any:
    """A model in float32, ready to run. Raises ValueError with the first sentence of the library's message."""
    import torch

    try:
        loaded = model.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{directory}: cannot be loaded: {reason(error)}") from None
    return loaded.to(device).eval()


def load_processor(processor: Any, directory: Path) -> Any:
    """A processor or tokenizer. Raises ValueError with the first sentence of the library's message."""
    try:
        return processor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{directory}: cannot be loaded: {reason(error)}") from None
