"""Make the demo's two starting points: `python -m engine.tiny OUT` writes OUT/clip and OUT/vicuna in HF format.

The two are trained side by side, each on one thread: twice as fast as one after the other on two cores, and a sum
computed by one thread has one order, so that the same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from dataloaders.files import directory_written_atomically
from engine.tiny import clip as tiny_clip
from engine.tiny import vicuna as tiny_vicuna
from engine.tiny.tokenizer import build_tokenizer

VERSION = 4
"""Of the recipe: weights made by another are refused rather than taken for these."""


@dataclass(frozen=True)
class TinyConfig:
    """What the tiny models are trained on; the same configuration always gives the same weights.

    clip_steps    steps of 128 stills
    list_steps    first steps of the Vicuna, of 32 dialogues that are mostly lists
    vicuna_steps  further ones, of 32 of every kind
    frames        N, words in a log and so frames of a video later
    seed          of weights and data
    """

    clip_steps: int = 1200
    list_steps: int = 350
    vicuna_steps: int = 750
    frames: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clip_steps", "list_steps", "vicuna_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 2 <= self.frames <= 100:
            raise ValueError(f"--frames must be 2 to 100 (indices have two digits), not {self.frames}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, not {self.seed}")


def make_clip(directory: Path, config: TinyConfig) -> str:
    """Train, probe and write the tiny CLIP; return its probe in words."""
    torch.set_num_threads(1)
    model = tiny_clip.train(config.clip_steps, config.seed)
    alone, among = tiny_clip.probe(model)
    with directory_written_atomically(directory) as beside:
        tiny_clip.save(model, beside)
        _write_manifest(beside, config)
    return f"clip: R2 of position from features {alone:.2f} alone, {among:.2f} among three"


def make_vicuna(directory: Path, config: TinyConfig) -> str:
    """Train, probe and write the tiny Vicuna; return its probe in words."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = tiny_vicuna.train(tokenizer, config.list_steps, config.vicuna_steps, config.frames, config.seed)
    right = tiny_vicuna.probe(model, tokenizer, config.frames)
    with directory_written_atomically(directory) as beside:
        tiny_vicuna.save(model, tokenizer, beside)
        _write_manifest(beside, config)
    return f"vicuna: {right:.0%} of questions about logs of several things answered to within one frame"


def _write_manifest(directory: Path, config: TinyConfig) -> None:
    (directory / "tiny.json").write_text(json.dumps({"version": VERSION, **asdict(config)}, indent=1))


def _missing(directory: Path, config: TinyConfig) -> bool:
    """Whether `directory` is still to be made. Raises ValueError when it holds anything but what `config` makes."""
    if not directory.exists():
        return True
    manifest = directory / "tiny.json"
    wanted = {"version": VERSION, **asdict(config)}
    if not manifest.exists() or json.loads(manifest.read_text()) != wanted:
        raise ValueError(f"{directory} holds something else than the tiny model of {wanted}; choose another folder")
    return False


def make_tiny(output: Path, config: TinyConfig) -> list[str]:
    """Make what is missing of `output`/clip and `output`/vicuna; return what there is to say about each made."""
    makers = {output / "clip": make_clip, output / "vicuna": make_vicuna}
    missing = {directory: make for directory, make in makers.items() if _missing(directory, config)}
    if not missing:
        return []
    with ProcessPoolExecutor(len(missing), mp_context=get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(make, path, config) for path, make in missing.items()]]


def main(arguments: list[str] | None = None) -> int:
    defaults = TinyConfig()
    parser = argparse.ArgumentParser(prog="python -m engine.tiny", description=__doc__, allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make; repeating the command is harmless")
    parser.add_argument("--clip-steps", type=int, default=defaults.clip_steps, help="of 128 stills (%(default)s)")
    parser.add_argument(
        "--list-steps", type=int, default=defaults.list_steps, help="of 32 dialogues, mostly lists (%(default)s)"
    )
    parser.add_argument("--vicuna-steps", type=int, default=defaults.vicuna_steps, help="of 32 dialogues (%(default)s)")
    parser.add_argument("--frames", type=int, default=defaults.frames, help="frames of a video (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of weights and data (%(default)s)")
    flags = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        config = TinyConfig(flags.clip_steps, flags.list_steps, flags.vicuna_steps, flags.frames, flags.seed)
        said = make_tiny(flags.output, config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in said:
        print(line)
    print(f"{flags.output}: {f'made in {time.monotonic() - started:.0f} s' if said else 'already whole'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
