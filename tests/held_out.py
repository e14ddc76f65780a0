"""Held-out videos of a small synthetic world, with random features, a random model and a random CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest
from dataloaders.synthetic.world import WorldConfig, make_world
from engine.tiny.tokenizer import build_tokenizer
from pite.checkpoint import save_pretrained
from tests.samples import tiny_model

CHANNELS, FRAMES = 16, 8


def make_held_out(root: Path) -> Path:
    """Write ROOT/data with 4 held-out videos, ROOT/store with their features, ROOT/model and ROOT/clip."""
    make_world(root / "data", WorldConfig(videos=1, evaluation=4, images=1, frames=FRAMES), processes=1)
    save_model(root / "model", seed=0)
    save_clip(root / "clip", CHANNELS)
    store = FeatureStore.create_or_open(
        root / "store" / "videos", Manifest("random", FRAMES, "none", "none", FRAMES, CHANNELS)
    )
    rng = np.random.default_rng(0)
    with FeatureWriter(store) as writer:
        for video in json.loads((root / "data/evaluation/activitynet_captions.json").read_text()):
            writer.add({f"evaluation/{video}": rng.standard_normal((FRAMES, CHANNELS))})
    return root


def save_model(directory: Path, seed: int) -> None:
    """Write a random PiTe with its tokenizer."""
    tokenizer = build_tokenizer()
    save_pretrained(tiny_model(seed=seed, vocab_size=len(tokenizer)), directory)
    tokenizer.save_pretrained(str(directory))


def save_clip(directory: Path, channels: int) -> None:
    """Write a random CLIP vision tower for 32 x 32 pixels, with its pre-processing."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**shape, image_size=32, patch_size=16, projection_dim=channels)
    CLIPVisionModelWithProjection(vision).save_pretrained(directory)
    preprocess = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocess))
