"""PG-Video-LLaVA's features of a video: CLIP's patches, pooled over each frame and over each place in the frame.

The patches are the last hidden states but one, without the CLS token and the post-layernorm. One video's patches are 118 MB in
half precision for ViT-L/14 at 336 pixels; the record of 676 rows is 1.4 MB. So they are pooled on the device.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pite import clip
from pite.clip import ClipEncoder
from pite.families import Extractor, Family
from pite.towers import CLIP, clip_patches, patch_flops


def pool(patches: Tensor, counts: Tensor) -> Tensor:
    """Patches of V videos (V, N, P, C) -> records (V, N + P, C) float32: N temporal rows, then P spatial ones.

    counts  (V,) frames of each video; those behind are padding
    A temporal row is the mean over a frame's patches, 0 where frames lack; a spatial row is the mean of one patch over the
    frames. Patches are rounded to half precision first, as in the published files, and summed in single precision.
    """
    patches = patches.half().float()
    real = (torch.arange(patches.shape[1], device=patches.device) < counts[:, None])[:, :, None]
    temporal = torch.where(real, patches.mean(2), 0.0)
    spatial = torch.where(real[..., None], patches, 0.0).sum(1) / counts[:, None, None]
    return torch.cat([temporal, spatial], dim=1)


class PooledEncoder(ClipEncoder):
    """A CLIP vision tower whose patches are pooled to a video's record; see `ClipEncoder` for its arguments and errors."""

    extractor: Extractor = "pooled_patches"

    def __init__(self, path: str | Path, device: str = "cpu", *, compiled: bool = False) -> None:
        super().__init__(str(path), device)
        if self.tower is not CLIP:
            raise ValueError(f"{path} is a {self.tower.name} model, and the family's features are patches of CLIP")
        self.preprocess = self.preprocess.by("squash")
        self._records = torch.compile(self.pooled, fullgraph=True, dynamic=False) if compiled else self.pooled

    @property
    def channels(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def num_places(self) -> int:
        """P, places of patches in a frame."""
        return int(self.model.config.image_size // self.model.config.patch_size) ** 2

    def tokens(self, num_frames: int) -> int:
        return num_frames + self.num_places

    @property
    def flops_per_frame(self) -> float:
        return patch_flops(self.model.config)

    def embed(self, frames: Tensor) -> Tensor:
        """Squashed frames (n, S, S, 3) uint8 on the encoder's device -> their patches (n, P, C)."""
        return clip_patches(self.model, self.preprocess.normalized(frames).to(self.model.dtype))

    def pooled(self, frames: Tensor, counts: Tensor) -> Tensor:
        return pool(self.embed(frames).unflatten(0, (len(counts), -1)), counts)

    @torch.inference_mode()
    def records(self, frames: np.ndarray | Tensor, counts: list[int]) -> Tensor:
        """Records (V, N + P, C) float32 of V videos' frames (V * N, S, S, 3) uint8, on the encoder's device.

        counts  frames of each video; the others of its N are padding
        """
        tensor = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
        tensor = tensor.to(self.device, non_blocking=True)
        return self._records(tensor, torch.tensor(counts, device=self.device))


def load_encoder(family: Family, path: str, device: str = "cpu", *, compiled: bool = False) -> ClipEncoder:
    """The encoder of a family's features. Raises ValueError as `ClipEncoder` does."""
    encoder = PooledEncoder if family.extractor == PooledEncoder.extractor else clip.ClipEncoder
    return encoder(path, device, compiled=compiled)


def record_of(encoder: ClipEncoder, frames: np.ndarray, num_frames: int) -> Tensor:
    """The record of one video's resized frames (n, S, S, 3) uint8, at most `num_frames`: (tokens, channels) float32."""
    if not isinstance(encoder, PooledEncoder):
        return encoder.encode(frames)
    padding = np.zeros((num_frames - len(frames), *frames.shape[1:]), np.uint8)
    return encoder.records(np.concatenate([frames, padding]), [len(frames)])[0]
