"""The training of the demo's two initial models, and the manifest of each.

The two are trained in parallel, each on one thread. On two cores this is faster than one after the other, and one thread
always sums in the same order, so the same seed gives the same weights on the same kind of CPU.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionModelWithProjection, LlamaForCausalLM, PreTrainedTokenizerFast

from dataloaders import logs
from dataloaders.files import directory_written_atomically, sha256, write_tensors
from dataloaders.logs import LogLevel
from engine.tiny import clip, probes, vicuna
from engine.tiny.config import TinyConfig
from engine.tiny.prefix import machine, measure_clip, measure_vicuna
from engine.tiny.progress import Progress
from engine.tiny.tokenizer import build_tokenizer

VERSION = 6
"""Version of the recipe: weights of another version are refused."""

SETTINGS = {"clip": ("clip_steps", "seed"), "vicuna": ("vicuna_steps", "width", "frames", "motion", "seed")}
"""The settings that each model depends on."""

MANIFEST = "tiny.json"
HEADS = "heads/heads.safetensors"
"""What `vicuna.Trainer` adds to the model. Only the probes read it."""


def make_clip(directory: Path, config: TinyConfig) -> str:
    """Train, probe and write the tiny CLIP; return one line with the probes' results."""
    torch.set_num_threads(1)
    prefix, progress = measure_clip(config), _progress(directory, config)
    model = clip.train(config.clip_steps, config.seed, progress)
    seconds = progress.seconds
    results = probe_clip(model)
    with directory_written_atomically(directory) as unfinished:
        clip.save(model, unfinished)
        _write_manifest(unfinished, _identity("clip", config), seconds, results, prefix)
    progress.remove()
    return f"clip: {_shown(results)}"


def make_vicuna(directory: Path, config: TinyConfig) -> str:
    """Train, probe and write the tiny Vicuna; return one line with the probes' results."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    prefix, progress = measure_vicuna(config, tokenizer), _progress(directory, config)
    trainer = vicuna.train(tokenizer, config, progress)
    seconds = progress.seconds
    results = probe_vicuna(trainer, tokenizer, config.frames)
    with directory_written_atomically(directory) as unfinished:
        vicuna.save(trainer.model, tokenizer, unfinished)
        (unfinished / HEADS).parent.mkdir()
        write_tensors(unfinished / HEADS, _heads(trainer))
        _write_manifest(unfinished, _identity("vicuna", config), seconds, results, prefix)
    progress.remove()
    return f"vicuna: {_shown(results)}"


def probe_clip(model: CLIPVisionModelWithProjection) -> dict[str, float]:
    """What a linear probe reads from the tiny CLIP's features: of the red thing alone, and among two others."""
    alone, among = clip.probe(model, 0), clip.probe(model, 2)
    return {
        "position R2, alone": alone.position,
        "position R2, among three": among.position,
        "shapes right, alone": alone.shape,
        "shapes right, among three": among.shape,
    }


def probe_vicuna(trainer: vicuna.Trainer, tokenizer: PreTrainedTokenizerFast, num_frames: int) -> dict[str, float]:
    """What the tiny Vicuna reads from logs that it was not trained on."""
    return {
        "grounding, right to within a frame": probes.probe_grounding(trainer, tokenizer, num_frames),
        **probes.probe_motion(trainer, tokenizer, num_frames),
    }


def load_clip(directory: Path) -> CLIPVisionModelWithProjection:
    """The tiny CLIP of a directory that `make_clip` wrote."""
    return CLIPVisionModelWithProjection.from_pretrained(directory).eval()


def load_vicuna(directory: Path) -> tuple[vicuna.Trainer, PreTrainedTokenizerFast]:
    """The tiny Vicuna of a directory that `make_vicuna` wrote, with its heads, and its tokenizer."""
    from safetensors.torch import load_file

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
    trainer = vicuna.Trainer(model, tokenizer, read_manifest(directory)["frames"])
    heads = load_file(directory / HEADS)
    missing = trainer.load_state_dict(heads, strict=False).missing_keys
    assert all(name.startswith("model.") for name in missing), missing
    return trainer.eval(), tokenizer


def _heads(trainer: vicuna.Trainer) -> dict[str, Tensor]:
    return {name: weights for name, weights in trainer.state_dict().items() if not name.startswith("model.")}


def _shown(results: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in results.items())


def _identity(name: str, config: TinyConfig) -> dict[str, Any]:
    return {"version": VERSION, **{field: getattr(config, field) for field in SETTINGS[name]}}


def _progress(directory: Path, config: TinyConfig) -> Progress:
    """The state of the unfinished training of a model, next to its folder."""
    return Progress(directory.with_name(f"{directory.name}.unfinished.pt"), _identity(directory.name, config))


def _write_manifest(
    directory: Path, identity: dict[str, Any], seconds: float, results: dict[str, float], prefix: dict[str, Any]
) -> None:
    record = {
        **identity,
        "sha256": sha256(directory / "model.safetensors"),
        "probes": {name: round(value, 6) for name, value in results.items()},
        "cpu_minutes": round(seconds / 60, 1),
        "machine": machine(),
        "prefix": prefix,
    }
    (directory / MANIFEST).write_text(json.dumps(record, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a tiny model."""
    record: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    return record


def _missing(directory: Path, config: TinyConfig) -> bool:
    """Whether `directory` does not exist yet. Raises ValueError if it holds anything but the model of `config`."""
    if not directory.exists():
        return True
    wanted = _identity(directory.name, config)
    if not (directory / MANIFEST).exists() or {**read_manifest(directory), **wanted} != read_manifest(directory):
        raise ValueError(f"{directory} does not hold the tiny model of {wanted}; choose another folder")
    return False


def make_tiny(output: Path, config: TinyConfig, log_level: LogLevel = "info") -> list[str]:
    """Make `output`/clip and `output`/vicuna if they are missing; return one line for each model made.

    log_level  of the processes that train them
    """
    makers = {output / "clip": make_clip, output / "vicuna": make_vicuna}
    missing = {directory: make for directory, make in makers.items() if _missing(directory, config)}
    if not missing:
        return []
    spawn = get_context("spawn")
    start = partial(logs.configure, log_level)
    with ProcessPoolExecutor(len(missing), spawn, initializer=start) as pool:
        return [future.result() for future in [pool.submit(make, path, config) for path, make in missing.items()]]
