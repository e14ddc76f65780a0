"""The first steps of a training, by which anyone can check that the committed code makes the committed weights.

A whole training takes many minutes. Its first steps take a second, and they depend on the same code, settings and
random numbers. A manifest holds the checksum of the weights after these steps and a loss that they reach.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from engine.tiny import clip, vicuna
from engine.tiny.batch import make_batch
from engine.tiny.config import TinyConfig
from engine.tiny.dialogues import sample_dialogue
from engine.tiny.progress import Progress

STEPS = 3


def measure_clip(config: TinyConfig) -> dict[str, Any]:
    """The tiny CLIP after the first steps; the number is the mean absolute feature of fresh stills."""
    model = clip.train(config.clip_steps, config.seed, Progress(), stop=STEPS)
    with torch.no_grad():
        features = model(pixel_values=clip.pixels(clip.sample_scenes(np.random.default_rng(0), 64))).image_embeds
    return {"steps": STEPS, "sha256": weights_sha256(model), "value": float(features.abs().mean())}


def measure_vicuna(config: TinyConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tiny Vicuna after the first steps; the number is the loss of the answers of fresh dialogues."""
    trainer = vicuna.train(tokenizer, config, Progress(), stop=STEPS)
    rng = np.random.default_rng(0)
    batch = make_batch([sample_dialogue(rng, config.frames) for _ in range(64)], tokenizer, rng)
    with torch.no_grad():
        loss = trainer.losses(batch)["answer"]
    return {"steps": STEPS, "sha256": weights_sha256(trainer), "value": float(loss)}


def weights_sha256(module: nn.Module) -> str:
    """Checksum of a module's weights, in order of their names."""
    digest = hashlib.sha256()
    for name, weights in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(weights.shape)} {weights.dtype}".encode())
        digest.update(weights.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def machine() -> dict[str, str]:
    """What the bits of a training depend on, apart from its settings: the kind of CPU, and PyTorch's version."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().partition("\n\n")[0].splitlines() if ":" in line)
        named = {name.strip(): value.strip() for name, value in fields.items()}
        cpu = ", ".join(f"{named[name]}" for name in ("model name", "cpu family", "model") if name in named) or cpu
    return {"cpu": cpu, "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
