"""Make a training workspace in a second: a small synthetic world, a random tiny Llama, random features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest
from dataloaders.synthetic.features import write_random_features
from dataloaders.synthetic.world import WorldConfig, make_world
from engine.tiny.tokenizer import build_tokenizer

FRAMES, CHANNELS = 8, 16


def make_workspace(root: Path) -> Path:
    """ROOT/data, ROOT/features and ROOT/llm; 24 videos and 24 stills."""
    make_world(root / "data", WorldConfig(videos=24, evaluation=2, images=24, frames=FRAMES), processes=1)
    make_language_model(root / "llm")
    write_random_features(root / "data", root / "features", FRAMES, CHANNELS)
    return root


def make_language_model(folder: Path) -> None:
    """A random tiny Llama and its tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer))).save_pretrained(folder)


PLACES = 16


def make_pg_workspace(root: Path) -> Path:
    """ROOT/data with four questions about each of 12 videos, ROOT/features of PG-Video-LLaVA's shape, ROOT/llm; no media."""
    questions = ("What moves?", "How many shapes can be seen?", "Where is the red circle?", "Which shape is first?")
    answers = ("a circle.", "There are two shapes.", "It is on the left.", "The red circle.")
    records = [
        {"q": q, "a": f"{a} {'It moves. ' * (i % 3)}", "video_id": f"v{i:02}"}
        for q, a in zip(questions, answers)
        for i in range(12)
    ]
    (root / "data" / "stage3").mkdir(parents=True)
    (root / "data" / "stage3" / "video_instruct.json").write_text(json.dumps(records))
    make_language_model(root / "llm")
    manifest = Manifest("none", FRAMES, "none", "none", FRAMES + PLACES, CHANNELS, extractor="pooled_patches")
    store, rng = FeatureStore.create_or_open(root / "features" / "videos", manifest), np.random.default_rng(0)
    with FeatureWriter(store) as writer:
        writer.add({f"stage3/v{i:02}": rng.standard_normal((FRAMES + PLACES, CHANNELS)) for i in range(12)})
    return root


def train_arguments(workspace: Path, output: Path, stage: str = "all", **flags: object) -> list[str]:
    """Command-line arguments of engine.train; flags are given as Python names."""
    flags = {"global_batch": 8, "epochs": 2, "token_budget": 600, "checkpoint_every": 2, "device": "cpu", **flags}
    paths = {"data": workspace / "data", "store": workspace / "features", "llm": workspace / "llm", "output": output}
    values = {**paths, "stage": stage, "model": "tiny", **flags}
    arguments = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        arguments += (
            [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    return arguments
