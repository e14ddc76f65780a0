"""Make a training workspace in a second: a small synthetic world, a random tiny Llama, random features."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataloaders.synthetic.features import write_random_features
from dataloaders.synthetic.world import WorldConfig, make_world
from engine.tiny.tokenizer import build_tokenizer

FRAMES, CHANNELS = 8, 16


def make_workspace(root: Path) -> Path:
    """ROOT/data, ROOT/features and ROOT/llm; 24 videos and 24 stills."""
    make_world(root / "data", WorldConfig(videos=24, evaluation=2, images=24, frames=FRAMES), processes=1)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(root / "llm")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer))).save_pretrained(root / "llm")
    write_random_features(root / "data", root / "features", FRAMES, CHANNELS)
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
