"""A tiny CLIP with random weights in Hugging Face's format, and a data folder to run it on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.media import write_video

SIZE = 32


def save_clip(directory: Path, seed: int = 0, size: int = SIZE) -> CLIPModel:
    """Write a random CLIP with both towers and its pre-processing, for pictures of `size` pixels; returns the model."""
    text = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": size, "patch_size": 8}
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 2}, vision_config=vision, projection_dim=16
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size).save_pretrained(directory)
    return model


def save_siglip(directory: Path, seed: int = 0, resample: int = 3) -> SiglipModel:
    """Write a random SigLIP with both towers and its pre-processing; `resample` 2 is bilinear, as in SigLIP 2."""
    text = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIZE, "patch_size": 8}
    torch.manual_seed(seed)
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    for name, parameter in model.named_parameters():  # their initial values are near zero, and so the feature
        if "head" in name or name.endswith("weight"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    size = {"height": SIZE, "width": SIZE}
    SiglipImageProcessorPil(size=size, resample=resample).save_pretrained(directory)
    return model


def write_data(data: Path, videos: int = 6, images: int = 3) -> Path:
    """Write a data folder: narrated images, videos, and questions about the same videos through a symbolic link."""
    rng = np.random.default_rng(0)
    (data / "stage1/images").mkdir(parents=True)
    (data / "stage3").mkdir()
    for i in range(images):
        pixels = rng.integers(0, 255, (40, 50 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"stage1/images/i{i}.jpg")
    for i in range(videos):
        write_video(data / f"stage2/videos/v{i}.mp4", 10 + 3 * i)
    narratives = [{"image_id": f"i{i}", "caption": "A.", "timed_caption": [], "traces": []} for i in range(images)]
    clips = [
        {"id": f"v{i}", "conversations": [], "meta": {"duration": 1 + 0.3 * i, "token": {}}} for i in range(videos)
    ]
    _write_lines(data / "stage1/localized_narratives.jsonl", narratives)
    _write_lines(data / "stage2/pite_143k.jsonl", clips)
    (data / "stage3/videos").symlink_to("../stage2/videos")
    questions = [{"q": "What?", "a": "It.", "video_id": f"v{i}"} for i in range(videos)]
    (data / "stage3/video_instruct.json").write_text(json.dumps(questions))
    return data


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
