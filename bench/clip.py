"""Speed of CLIP's image tower at its real shape: ours, ours with the last layer for every token, and transformers.

The weights are random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bench.measure import Step, interleaved
from dataloaders.decode.preprocess import Preprocess
from engine.hardware import peak_of
from pite.clip import ClipEncoder
from pite.towers import _layer

OURS, EVERY_TOKEN, TRANSFORMERS = CLIPS = "pite", "pite, every token", "transformers"
LEAST_COSINE = 0.999


def save_vit_l(directory: Path, image_size: int = 224) -> Path:
    """Save ViT-L/14 in Hugging Face's format, 0.6 GB of random bfloat16.

    The shape is that of openai/clip-vit-large-patch14 with 224 pixels, of its -336 version with 336.
    """
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPVisionConfig(**shape, patch_size=14, projection_dim=768, image_size=image_size)
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(2**20, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(float(name.endswith("weight")))
        else:
            # The same million numbers, repeated: drawing 300 million takes longer than the measurement.
            repeated = block.repeat(-(-parameter.numel() // len(block)))
            parameter.data = repeated[: parameter.numel()].view_as(parameter).clone()
    positions = model.vision_model.embeddings
    positions.position_ids = torch.arange(positions.num_positions).unsqueeze(0)
    model.save_pretrained(directory)
    values = {"size": {"shortest_edge": image_size}, "crop_size": image_size, "image_mean": Preprocess.mean}
    (directory / "preprocessor_config.json").write_text(json.dumps({**values, "image_std": Preprocess.std}))
    return directory


@dataclass(frozen=True)
class ClipRow:
    """Frames per second of one implementation: median, 10th and 90th percentile; or a `problem`.

    mfu  fraction of the device's bfloat16 peak, counting the FLOPs that the feature needs; None on an unknown device
    """

    implementation: str
    frames_per_second: float | None = None
    slow: float | None = None
    fast: float | None = None
    mfu: float | None = None
    problem: str | None = None


def implementations(encoder: ClipEncoder) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions from cropped frames (n, S, S, 3) uint8 on the encoder's device to features.

    On CUDA ours with every token is compiled; ours is compiled if `encoder` is.
    """
    on_gpu = encoder.device.type == "cuda"

    def every_token(frames: Tensor) -> Tensor:
        vision = encoder.model.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(encoder.preprocess.normalized(frames).to(encoder.model.dtype)))
        for layer in vision.encoder.layers:
            hidden = _layer(layer, hidden, hidden.shape[1])
        features: Tensor = encoder.model.visual_projection(vision.post_layernorm(hidden[:, 0]))
        return features.float()

    def transformers(frames: Tensor) -> Tensor:
        pixels = encoder.preprocess.normalized(frames).to(encoder.model.dtype)
        features: Tensor = encoder.model(pixel_values=pixels).image_embeds
        return features.float()

    every = torch.compile(every_token, fullgraph=True, dynamic=False) if on_gpu else every_token
    return {OURS: encoder.encode, EVERY_TOKEN: every, TRANSFORMERS: transformers}


def measure(encoder: ClipEncoder, frames: int, rounds: int, only: Collection[str] = CLIPS) -> list[ClipRow]:
    """Time the implementations in turn on one batch of noise; only those whose features agree with transformers'."""
    side, device = encoder.preprocess.crop, encoder.device
    noise = torch.randint(0, 256, (frames, side, side, 3), dtype=torch.uint8, device=device)
    functions = implementations(encoder)
    rows: list[ClipRow] = []
    with torch.inference_mode():
        expected = functions[TRANSFORMERS](noise)
        steps: dict[str, Step] = {}
        for name in only:
            function = functions[name]
            try:
                cosine = F.cosine_similarity(function(noise), expected).min().item()
            except Exception as error:  # One failure must not stop the others.
                rows.append(ClipRow(name, problem=f"{type(error).__name__}: {str(error).splitlines()[0]}"))
                continue
            if not cosine >= LEAST_COSINE:
                rows.append(ClipRow(name, problem=f"its features have a cosine of {cosine:.4f} to transformers'"))
                continue
            steps[name] = partial(_listed, function, noise)
        # Each has already run once, which is enough warm-up on a CPU.
        timings = interleaved(steps, device, rounds, warmups=2 if device.type == "cuda" else 0)
    peak = peak_of(device)
    for name, timing in timings.items():
        rate = frames / timing.median
        mfu = None if peak is None else rate * encoder.flops_per_frame / peak
        rows.append(ClipRow(name, rate, frames / timing.high, frames / timing.low, mfu))
    return rows


def _listed(function: Callable[[Tensor], Tensor], frames: Tensor) -> list[Tensor]:
    return [function(frames)]
