"""The training of the demo's two initial models.

The two are trained in parallel, each on one thread. On two cores this is twice as fast as one after the other, and one
thread always sums in the same order, so the same seed gives the same weights.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from dataloaders import logs
from dataloaders.files import directory_written_atomically
from dataloaders.logs import LogLevel
from engine.tiny import clip, vicuna
from engine.tiny.config import TinyConfig
from engine.tiny.tokenizer import build_tokenizer

VERSION = 4
"""Version of the recipe: weights of another version are refused."""


def make_clip(directory: Path, config: TinyConfig) -> str:
    """Train, probe and write the tiny CLIP; return one line with the probe's result."""
    torch.set_num_threads(1)
    model = clip.train(config.clip_steps, config.seed)
    alone, among = clip.probe(model)
    with directory_written_atomically(directory) as unfinished:
        clip.save(model, unfinished)
        _write_manifest(unfinished, config)
    return f"clip: R2 of position from features {alone:.2f} alone, {among:.2f} among three"


def make_vicuna(directory: Path, config: TinyConfig) -> str:
    """Train, probe and write the tiny Vicuna; return one line with the probe's result."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = vicuna.train(tokenizer, config.list_steps, config.vicuna_steps, config.frames, config.seed)
    right = vicuna.probe(model, tokenizer, config.frames)
    with directory_written_atomically(directory) as unfinished:
        vicuna.save(model, tokenizer, unfinished)
        _write_manifest(unfinished, config)
    return f"vicuna: {right:.0%} of questions about logs of several things answered to within one frame"


def _write_manifest(directory: Path, config: TinyConfig) -> None:
    (directory / "tiny.json").write_text(json.dumps({"version": VERSION, **asdict(config)}, indent=1))


def _missing(directory: Path, config: TinyConfig) -> bool:
    """Whether `directory` does not exist yet. Raises ValueError if it holds anything but the model of `config`."""
    if not directory.exists():
        return True
    manifest = directory / "tiny.json"
    wanted = {"version": VERSION, **asdict(config)}
    if not manifest.exists() or json.loads(manifest.read_text()) != wanted:
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
    with ProcessPoolExecutor(len(missing), spawn, initializer=logs.configure, initargs=(log_level,)) as pool:
        return [future.result() for future in [pool.submit(make, path, config) for path, make in missing.items()]]
