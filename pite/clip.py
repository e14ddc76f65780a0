"""The frozen image encoder, CLIP's unless another is given: one feature per frame, computed once and stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dataloaders.decode.preprocess import Preprocess
from dataloaders.errors import reason
from dataloaders.files import read_json_object
from pite import devices, hub
from pite.families import Extractor
from pite.towers import CLIP, Tower, tower_of

_FILES = ("config.json", "preprocessor_config.json")


class ClipEncoder:
    """An image tower (`pite.towers`) in evaluation mode; bfloat16 on CUDA, float32 on the CPU.

    The feature is the tower's pooled output, not normalised: for CLIP `image_embeds` (768 channels for ViT-L/14, PiTe
    section 4.1), for SigLIP `pooler_output`.

    path      directory in Hugging Face's format, weights in safetensors or torch files, or a name on its hub such as
              openai/clip-vit-large-patch14
    device    "cpu", "cuda" or "cuda:1"
    compiled  use torch.compile, which compiles once per number of frames; for many batches of one size
    Raises ValueError when the model or the device does not exist.
    """

    extractor: Extractor = "image_embeds"

    def __init__(self, path: str, device: str = "cpu", *, compiled: bool = False) -> None:
        self.device = devices.resolve(device)
        try:
            directory = hub.resolve(path, _FILES)
        except hub.DownloadError as error:
            # Chat and engine.encode have a name as the default.
            raise ValueError(f"{error}; give a folder with --clip") from None
        self.preprocess = Preprocess.load(directory)
        with _quiet():
            self.tower, model = _load(directory)
        if model.config.image_size != self.preprocess.crop:
            raise ValueError(
                f"{path}: its model takes {model.config.image_size} pixels, but its preprocessor_config.json crops "
                f"{self.preprocess.crop}"
            )
        self.checksum = _checksum(model)
        self.model = model.eval().requires_grad_(False)
        nn.Module.to(self.model, self.device, devices.dtype(self.device))
        for parameter in self.model.parameters():
            # Memory alignment changes the last bits of matrix products on a CPU, and mapped weights have any alignment.
            parameter.data = parameter.data.clone()
        self._embed = torch.compile(self.embed, fullgraph=True, dynamic=False) if compiled else self.embed

    @property
    def channels(self) -> int:
        return self.tower.channels(self.model.config)

    def tokens(self, num_frames: int) -> int:
        """Rows of the record of a video of `num_frames` frames."""
        return num_frames

    @property
    def flops_per_frame(self) -> float:
        return self.tower.flops(self.model.config)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Cropped frames (n, S, S, 3) uint8 on any device -> features (n, channels) float32 on the encoder's device."""
        tensor = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
        return self._embed(tensor.to(self.device, non_blocking=True))

    def embed(self, frames: Tensor) -> Tensor:
        """As `encode`, for frames on the encoder's device; traced without a graph break."""
        pixels = self.preprocess.normalized(frames).to(self.model.dtype)
        return self.tower.pooled(self.model, pixels).float()


def _load(directory: Path) -> tuple[Tower, PreTrainedModel]:
    """The image tower in float32, from a complete model or from a tower saved alone."""
    path = directory / "config.json"
    try:
        values = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{directory} is not a CLIP model: {error}") from None
    try:
        tower = tower_of(values.get("model_type"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        config: Any = tower.config.from_pretrained(directory)
    except Exception as error:  # a wrong value makes transformers and its validators raise any exception
        raise ValueError(f"{path} is not a {tower.name} configuration: {reason(error)}") from None
    if tower is CLIP:
        # projection_dim belongs to the complete model's config; its vision_config may lack it.
        config.projection_dim = values.get("projection_dim", config.projection_dim)
    elif not config.vision_use_head:
        raise ValueError(f"{path}: vision_use_head is off, and without the head there is no feature of a whole picture")
    try:
        # With a state_dict transformers opens no file, so it cannot execute a malicious one.
        loaded: Any = tower.model.from_pretrained(
            None,
            config=config,
            state_dict=dict(hub.Weights(directory)),
            dtype=torch.float32,
            output_loading_info=True,
        )
    except RuntimeError as error:
        shape = "of the shape in its config.json"
        raise ValueError(f"{directory} is not a {tower.name} model {shape}: {reason(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        # transformers would have filled them with random numbers.
        raise ValueError(f"{directory} is not a {tower.name} vision tower: it lacks {min(report['missing_keys'])}")
    assert isinstance(model, tower.model)
    return tower, model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report about the unused text tower and its progress bar."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _checksum(model: PreTrainedModel) -> str:
    """SHA-256 over everything that determines a feature: every weight by name, and the config values that matter.

    It does not depend on how the weights are split into files, or on the presence of a text tower.
    """
    digest = hashlib.sha256()
    config = model.config
    digest.update(f"{config.hidden_act} {config.layer_norm_eps} {config.num_attention_heads}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
