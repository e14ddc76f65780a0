"""Frames as CLIP wants them, the same numbers that Hugging Face's CLIPImageProcessor gives on Pillow.

Cropping yields uint8, a quarter of the bytes to move between processes; normalising waits until the frames are on the
device that encodes them. Workers that only crop need no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """Bicubic resize of the shorter side, centre crop, normalisation. Defaults: OpenAI's CLIP at 224 pixels.

    resize  length of the shorter side after the resize, in pixels
    crop    side S of the square cut out of its middle
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise ValueError(f"a crop of {self.crop} pixels does not fit a shorter side of {self.resize}")

    @staticmethod
    def load(directory: Path) -> Preprocess:
        """Read DIRECTORY/preprocessor_config.json. Raises ValueError where it asks for anything else than this does."""
        path = directory / "preprocessor_config.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(
                f"{directory} holds no preprocessor_config.json, so nobody knows what its model saw"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not values.get(name, True):
                raise ValueError(f"{path}: {name} is off, which is not supported")
        if values.get("resample", Image.Resampling.BICUBIC) != Image.Resampling.BICUBIC:
            raise ValueError(
                f"{path}: resample is {values['resample']}, only bicubic ({Image.Resampling.BICUBIC}) is supported"
            )
        size, crop = values.get("size", 224), values.get("crop_size", 224)
        if isinstance(size, dict) and "shortest_edge" not in size:
            raise ValueError(f"{path}: size is {size}, only a shortest_edge is supported")
        if isinstance(crop, dict) and crop["height"] != crop["width"]:
            raise ValueError(f"{path}: crop_size is {crop}, only a square is supported")
        return Preprocess(
            resize=size["shortest_edge"] if isinstance(size, dict) else size,
            crop=crop["height"] if isinstance(crop, dict) else crop,
            mean=tuple(values.get("image_mean", Preprocess.mean)),
            std=tuple(values.get("image_std", Preprocess.std)),
        )

    def describe(self) -> str:
        """All of it in one line, for a store's manifest."""
        return json.dumps({"filter": "bicubic", **asdict(self)})

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize. The longer side is truncated, not rounded."""
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize

    def cropped(self, frame: np.ndarray) -> np.ndarray:
        """Resize and crop one frame (H, W, 3) uint8 to (S, S, 3) uint8."""
        height, width = self.resized(*frame.shape[:2])
        resized = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        return np.array(resized.crop((left, top, left + self.crop, top + self.crop)))

    def normalized(self, frames: Tensor) -> Tensor:
        """Cropped frames (n, S, S, 3) uint8, on any device, as pixel values (n, 3, S, S) float32."""
        pixels = frames.permute(0, 3, 1, 2).float() / 255
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std
