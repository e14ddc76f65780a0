"""Resize, crop and normalise frames, with the same results as Hugging Face's image processors on Pillow (CLIP, SigLIP).

PG-Video-LLaVA squashes frames to a square instead, by nearest neighbours. That is two gathers, on any device.

Cropped frames are uint8, a quarter of the bytes to move between processes. They are normalised later, on the device
that encodes them. Worker processes only crop, so they do not import torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from dataloaders.files import read_json_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue by which OpenAI's CLIP normalises pixels between 0 and 1."""

Filter = Literal["bicubic", "bilinear", "nearest"]
_FILTERS: dict[Filter, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

ARITHMETIC = {"cpu": "float32", "cuda": "float16"}
"""Precision of the resize, by device. Half precision holds 0 to 255 exactly; rounding its weights costs below 1/255."""

Resize = Literal["crop", "squash"]
"""Bicubic resize of the shorter side and a centre crop; or nearest neighbours of the whole picture in a square."""

_EXTREME = 128
"""Ratio of the sides above which only the middle of a picture is resized."""

_PART = 2**27
"""Pixel values to resize at a time, since each needs a copy of the frames in another type and memory layout."""


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop, normalisation. Defaults: OpenAI's CLIP at 224 pixels.

    resize  length of the shorter side after the resize, in pixels
    crop    side S of the square cut out of its middle
    filter  of the resize; Pillow's, which averages where a picture gets smaller, or PyTorch's nearest neighbours
    squash  resize both sides to `resize`, whatever the picture's shape, as SigLIP and PG-Video-LLaVA do
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    filter: Filter = "bicubic"
    squash: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise ValueError(f"a crop of {self.crop} pixels does not fit a shorter side of {self.resize}")

    @staticmethod
    def load(directory: Path) -> Preprocess:
        """Read DIRECTORY/preprocessor_config.json. Raises ValueError for settings that this class does not support."""
        path = directory / "preprocessor_config.json"
        if not path.exists():
            raise ValueError(
                f"{directory} holds no preprocessor_config.json; copy it there, because it defines the resize and crop"
            )
        values = {name: value for name, value in read_json_object(path).items() if value is not None}
        if "max_num_patches" in values:
            raise ValueError(f"{path}: pictures of varying shape (max_num_patches) are not supported")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not values.get(name, True):
                raise ValueError(f"{path}: {name} is off, which is not supported")
        try:
            if abs(float(values.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-3:
                raise ValueError(f"rescale_factor is {values['rescale_factor']}, only 1/255 is supported")
            return _parse(values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def by(self, resize: Resize) -> Preprocess:
        """The same crop size and normalisation, with this kind of resize."""
        return self if resize == "crop" else replace(self, resize=self.crop, filter="nearest", squash=True)

    def describe(self) -> str:
        """All settings in one line, for a store's manifest. CLIP's line is that of earlier versions."""
        settings = asdict(self)
        if not settings["squash"]:
            del settings["squash"]
        return json.dumps({"filter": settings.pop("filter"), **settings})

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize. The longer side is truncated, not rounded."""
        if self.squash:
            return self.resize, self.resize
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize

    def cropped(self, frame: np.ndarray) -> np.ndarray:
        """Resize and crop one frame (H, W, 3) uint8 to (S, S, 3) uint8."""
        if self.filter == "nearest":
            rows, columns = (nearest(old, self.crop) for old in frame.shape[:2])
            return frame[rows][:, columns]
        height, width = self.resized(*frame.shape[:2])
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        picture, resample = Image.fromarray(frame), _FILTERS[self.filter]
        if self.is_extreme(*frame.shape[:2]):
            across, down = frame.shape[1] / width, frame.shape[0] / height
            box = (left * across, top * down, (left + self.crop) * across, (top + self.crop) * down)
            return np.array(picture.resize((self.crop, self.crop), resample, box=box))
        resized = picture.resize((width, height), resample)
        return np.array(resized.crop((left, top, left + self.crop, top + self.crop)))

    def is_extreme(self, height: int, width: int) -> bool:
        """Whether a picture is so long that only its middle is resized.

        A picture of 1 x 30000 pixels would have 1.5 billion pixels after the resize. For ordinary pictures the whole is
        resized, which gives the last bit of Hugging Face's processor; a box is rounded to single precision in Pillow.
        """
        return self.filter != "nearest" and max(self.resized(height, width)) > _EXTREME * self.resize

    def cropped_batch(self, frames: Tensor) -> Tensor:
        """`cropped` for many frames of one size, on their device: (n, H, W, 3) uint8 to (n, S, S, 3) uint8.

        The resize is a matrix product for each axis, which a GPU does in a fraction of CLIP's time. Within 1/255 of
        Pillow in single precision and 2/255 in half, also on white noise.
        """
        import torch

        (height, width), dtype = frames.shape[1:3], ARITHMETIC[frames.device.type]
        if self.filter == "nearest":
            rows, columns = (_nearest_on(old, self.crop, frames.device) for old in (height, width))
            return frames.index_select(1, rows).index_select(2, columns)
        resized = self.resized(height, width)
        top, bottom, down = _weights(height, resized[0], self.crop, self.filter, frames.device, dtype)
        left, right, across = _weights(width, resized[1], self.crop, self.filter, frames.device, dtype)
        # Pixels outside of the crop are not resized: 43% of a 16:9 picture.
        seen = frames[:, top:bottom, left:right]
        parts = []
        for part in seen.split(max(1, _PART // seen[0].numel())):
            planes = part.permute(0, 3, 1, 2).to(down.dtype, memory_format=torch.contiguous_format)
            if _across_first(height, width, resized, self.filter):
                planes = down @ _whole(planes @ across.T)
            else:
                planes = _whole(down @ planes) @ across.T
            parts.append(_whole(planes).to(torch.uint8).permute(0, 2, 3, 1))
        return torch.cat(parts).contiguous()

    def normalized(self, frames: Tensor) -> Tensor:
        """Cropped frames (n, S, S, 3) uint8, on any device, as pixel values (n, 3, S, S) float32."""
        pixels = frames.permute(0, 3, 1, 2).float() / 255
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


def _parse(values: dict[str, Any]) -> Preprocess:
    """The settings of a preprocessor_config.json. Raises ValueError, KeyError or TypeError."""
    siglip = "Siglip" in str(values.get("image_processor_type"))
    names = {int(code): name for name, code in _FILTERS.items()}
    resample = values.get("resample", Image.Resampling.BICUBIC)
    if resample not in names:
        raise ValueError(f"resample is {resample}, only bicubic (3) and bilinear (2) are supported")
    size: Any = values.get("size", {"height": 224, "width": 224} if siglip else 224)
    squash = isinstance(size, dict) and "shortest_edge" not in size
    if squash and (size.get("height") is None or size["height"] != size.get("width")):
        raise ValueError(f"size is {size}, only a square or a shortest_edge is supported")
    resize: Any = size["height" if squash else "shortest_edge"] if isinstance(size, dict) else size
    crop: Any = values.get("crop_size", resize if squash else 224)
    if isinstance(crop, dict) and crop["height"] != crop["width"]:
        raise ValueError(f"crop_size is {crop}, only a square is supported")
    if not values.get("do_center_crop", not squash):
        if not squash:
            raise ValueError("do_center_crop is off, which is not supported with a shortest_edge")
        crop = resize
    half = (0.5, 0.5, 0.5)
    return Preprocess(
        int(resize),
        int(crop["height"] if isinstance(crop, dict) else crop),
        mean=tuple(values.get("image_mean", half if siglip else CLIP_MEAN)),
        std=tuple(values.get("image_std", half if siglip else CLIP_STD)),
        filter=names[resample],
        squash=squash,
    )


def _whole(pixels: Tensor) -> Tensor:
    """Round to integers from 0 to 255, in place. Halves round up, as in Pillow."""
    return pixels.add_(0.5).floor_().clamp_(0, 255)


@lru_cache(256)
def nearest(old: int, new: int) -> np.ndarray:
    """The row or column, of `old`, that each of `new` is taken from: (new,) int64, as in PyTorch's nearest interpolation.

    The product is in single precision; the whole number x * old // new is another one for 5 of 336 columns of 1080.
    """
    scale = np.float32(old) / np.float32(new)
    places = np.arange(new, dtype=np.float32) * scale
    return np.minimum(places.astype(np.int64), old - 1)


@lru_cache(256)
def _nearest_on(old: int, new: int, device: torch.device) -> Tensor:
    import torch

    return torch.from_numpy(nearest(old, new)).to(device)


@lru_cache(4096)
def _across_first(height: int, width: int, resized: tuple[int, int], name: Filter) -> bool:
    """Whether Pillow resizes pictures of this size horizontally first, which depends on Pillow's version.

    Pillow rounds and clips to 0 and 255 between the two passes, so their order changes white noise by up to 25/255.
    """
    resample = _FILTERS[name]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))
    steps = [(resized[1], height), (resized[1], resized[0])]
    by_steps = noise
    for size in steps:
        by_steps = by_steps.resize(size, resample)
    return noise.resize(steps[1], resample).tobytes() == by_steps.tobytes()


@lru_cache(256)
def _weights(old: int, new: int, crop: int, name: Filter, device: torch.device, dtype: str) -> tuple[int, int, Tensor]:
    """Pillow's resize of `old` pixels to `new`, for the middle `crop` alone.

    Returns the range of input pixels, first and end, and their weights (crop, end - first). The kernel is a triangle, or
    for bicubic Keys' (1981, a = -1/2), scaled by the step where that is above one pixel. At the picture's edges Pillow weighs the pixels that
    exist, instead of repeating the last, which differs by up to 14/255.
    """
    import torch

    step = old / new
    wide = max(1.0, step)
    centres = (torch.arange(crop, dtype=torch.float64) + (new - crop) // 2 + 0.5) * step
    first, last = (max(0, int(centres[0] - 2 * wide)), min(old, int(centres[-1] + 2 * wide) + 1))
    x = ((torch.arange(first, last) + 0.5) - centres[:, None]).abs() / wide
    if name == "bilinear":
        weights = (1 - x).clamp_min(0)
    else:
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
    weights /= weights.sum(1, keepdim=True)
    return first, last, weights.to(device, getattr(torch, dtype))
