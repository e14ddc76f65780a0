"""The image towers that make features: CLIP's and SigLIP's. SigLIP 2's of a fixed resolution are SigLIP's too.

Both are vision transformers of the same layers. They differ in the row that sums up the picture: CLIP has a token for it
and projects that, SigLIP attends to all patches with a learned query. To add a tower, add an instance of `Tower`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)


@dataclass(frozen=True)
class Tower:
    """One kind of image tower.

    config, model  transformers' classes
    pooled         a model and pixel values (n, 3, S, S) -> the feature of each picture (n, channels)
    channels       of a configuration
    flops          of a configuration: a picture's forward pass, multiply and add counted as two
    """

    name: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    pooled: Callable[[Any, Tensor], Tensor]
    channels: Callable[[Any], int]
    flops: Callable[[Any], float]


def tower_of(model_type: object) -> Tower:
    """The tower of a config.json's `model_type`. Raises ValueError for any other model."""
    kind = str(model_type)
    if kind.startswith("siglip2"):
        raise ValueError(
            "model_type 'siglip2' is SigLIP 2 with pictures of varying shape (NaFlex), which is not supported: take one of a "
            "fixed resolution, such as google/siglip2-so400m-patch14-384"
        )
    for names, tower in TOWERS.items():
        if kind in names:
            return tower
    raise ValueError(f"model_type {model_type!r} is not a CLIP model, nor a SigLIP model")


def frame_flops(config: CLIPVisionConfig, channels: int) -> float:
    """FLOPs of a frame in CLIP: 156e9 for ViT-L/14 at 224 pixels."""
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    rows = [tokens] * (config.num_hidden_layers - 1) + [1]
    return _flops_of_layers(config, tokens, rows) + 2 * width * channels


def patch_flops(config: CLIPVisionConfig) -> float:
    """FLOPs of a frame in all layers of CLIP but the last: 366e9 for ViT-L/14 at 336 pixels."""
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    return _flops_of_layers(config, tokens, [tokens] * (config.num_hidden_layers - 1))


def _flops_of_layers(config: Any, tokens: int, rows: list[int]) -> float:
    """FLOPs of the patches' embedding, and of layers that compute `rows` of their tokens."""
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    flops = 2.0 * patches * 3 * config.patch_size**2 * width
    for count in rows:
        keys_and_values = 4 * tokens * width**2
        for_each_row = 4 * width**2 + 4 * width * config.intermediate_size + 4 * tokens * width
        flops += keys_and_values + count * for_each_row
    return flops


def _siglip_flops(config: SiglipVisionConfig) -> float:
    patches = (config.image_size // config.patch_size) ** 2
    # The pooling is the attention and MLP of one more layer, for one row.
    return _flops_of_layers(config, patches, [patches] * config.num_hidden_layers + [1])


def _clip_pooled(model: Any, pixels: Tensor) -> Tensor:
    """`image_embeds`: the CLS token after the post-layernorm and the visual projection, not normalised.

    The last layer's output is used for the CLS token alone, so only that token's query, attention and MLP are computed
    there. This saves 3.5% of ViT-L/14's arithmetic.
    """
    vision, hidden = model.vision_model, _before_last_layer(model, pixels)
    last = _layer(vision.encoder.layers[-1], hidden, 1)
    pooled: Tensor = model.visual_projection(vision.post_layernorm(last[:, 0]))
    return pooled


def clip_patches(model: Any, pixels: Tensor) -> Tensor:
    """The patches (n, P, C) of CLIP's last hidden states but one, without the CLS token and the post-layernorm."""
    return _before_last_layer(model, pixels)[:, 1:]


def _before_last_layer(model: Any, pixels: Tensor) -> Tensor:
    vision = model.vision_model
    hidden: Tensor = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in list(vision.encoder.layers)[:-1]:
        hidden = _layer(layer, hidden, hidden.shape[1])
    return hidden


def _siglip_pooled(model: Any, pixels: Tensor) -> Tensor:
    """`pooler_output`: all patches after the post-layernorm, in the attention of a learned query, not normalised."""
    hidden = model.embeddings(pixels)
    for layer in model.encoder.layers:
        hidden = _layer(layer, hidden, hidden.shape[1])
    pooled: Tensor = model.head(model.post_layernorm(hidden))
    return pooled


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


CLIP = Tower(
    "CLIP",
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    _clip_pooled,
    lambda config: int(config.projection_dim),
    lambda config: frame_flops(config, config.projection_dim),
)
SIGLIP = Tower(
    "SigLIP",
    SiglipVisionConfig,
    SiglipVisionModel,
    _siglip_pooled,
    lambda config: int(config.hidden_size),
    _siglip_flops,
)
TOWERS = {("clip", "clip_vision_model"): CLIP, ("siglip", "siglip_vision_model"): SIGLIP}
"""`model_type` of a complete model and of its tower saved alone -> the tower."""
