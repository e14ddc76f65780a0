"""The frozen CLIP vision encoder: one image embedding per frame, computed once and stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from dataloaders.decode.preprocess import Preprocess
from dataloaders.errors import reason
from dataloaders.files import read_json_object
from pite import devices, hub
from pite.families import Extractor

_FILES = ("config.json", "preprocessor_config.json")


def frame_flops(config: CLIPVisionConfig, channels: int) -> float:
    """FLOPs of a frame's forward pass, multiply and add counted as two: 156e9 for ViT-L/14 at 224 pixels."""
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    flops = 2.0 * patches * 3 * config.patch_size**2 * width
    for rows in [tokens] * (config.num_hidden_layers - 1) + [1]:
        keys_and_values = 4 * tokens * width**2
        for_each_row = 4 * width**2 + 4 * width * config.intermediate_size + 4 * tokens * width
        flops += keys_and_values + rows * for_each_row
    return flops + 2 * width * channels


class ClipEncoder:
    """A CLIP vision tower in evaluation mode; bfloat16 on CUDA, float32 on the CPU.

    The feature is `image_embeds`: the CLS token after the post-layernorm and the visual projection, not normalised
    (768 channels for ViT-L/14, PiTe section 4.1).

    The last layer's output is used for the CLS token alone, so only that token's query, attention and MLP are computed
    there. This saves 3.5% of ViT-L/14's arithmetic.

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
            model = _load(directory)
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
        return int(self.model.config.projection_dim)

    def tokens(self, num_frames: int) -> int:
        """Rows of the record of a video of `num_frames` frames."""
        return num_frames

    @property
    def flops_per_frame(self) -> float:
        return frame_flops(self.model.config, self.channels)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Cropped frames (n, S, S, 3) uint8 on any device -> features (n, channels) float32 on the encoder's device."""
        tensor = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
        return self._embed(tensor.to(self.device, non_blocking=True))

    def embed(self, frames: Tensor) -> Tensor:
        """As `encode`, for frames on the encoder's device; traced without a graph break."""
        vision = self.model.vision_model
        pixels = self.preprocess.normalized(frames).to(self.model.dtype)
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        layers = list(vision.encoder.layers)
        for layer in layers[:-1]:
            hidden = _layer(layer, hidden, hidden.shape[1])
        summary = vision.post_layernorm(_layer(layers[-1], hidden, 1)[:, 0])
        embeddings: Tensor = self.model.visual_projection(summary)
        return embeddings.float()


def _layer(layer: Any, hidden: Tensor, rows: int) -> Tensor:
    """One encoder layer on hidden states (n, T, d), computed for the first `rows` tokens only: (n, rows, d)."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query, key, value = (
        projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projected in (attention.q_proj(normed[:, :rows]), attention.k_proj(normed), attention.v_proj(normed))
    )
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    hidden = hidden[:, :rows] + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    out: Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
    return out


def _load(directory: Path) -> CLIPVisionModelWithProjection:
    """The vision tower in float32, from a complete CLIP or from a vision tower saved alone."""
    path = directory / "config.json"
    try:
        values = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{directory} is not a CLIP model: {error}") from None
    try:
        config = CLIPVisionConfig.from_pretrained(directory)
    except Exception as error:  # a wrong value makes transformers and its validators raise any exception
        raise ValueError(f"{path} is not a CLIP configuration: {reason(error)}") from None
    # projection_dim belongs to the complete model's config; its vision_config may lack it.
    config.projection_dim = values.get("projection_dim", config.projection_dim)
    try:
        # With a state_dict transformers opens no file, so it cannot execute a malicious one.
        loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
            None,
            config=config,
            state_dict=dict(hub.Weights(directory)),
            dtype=torch.float32,
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise ValueError(f"{directory} is not a CLIP model of the shape in its config.json: {reason(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        # transformers would have filled them with random numbers.
        raise ValueError(f"{directory} is not a CLIP vision tower: it lacks {min(report['missing_keys'])}")
    assert isinstance(model, CLIPVisionModelWithProjection)
    return model


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


def _checksum(model: CLIPVisionModelWithProjection) -> str:
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
