"""Checks of a run's paths before torch is imported, and the lock of its folder."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dataloaders import paths
from dataloaders.formats import present_formats, split_of
from dataloaders.locks import lock
from dataloaders.store.features import Manifest
from engine.config import TrainConfig
from engine.recipes import RANDOM
from pite.lineage import LINEAGE, stages

if TYPE_CHECKING:
    from engine.distributed.world import World

SHARED_SECONDS = 75.0
"""Seconds for a new file to appear on other hosts: an NFS client remembers for up to 60 s that a folder did not exist."""


def check_paths(config: TrainConfig) -> None:
    """Raise ValueError or OSError if something that any stage of the run reads is missing.

    Checked are the data and features of each stage, one encoder for all features, the language model, the earlier
    stage's output, the file of held-out samples, and whether the output can be a folder.
    """
    paths.input_folder("--data", config.data.folder)
    encoders: dict[str, Path] = {}
    for stage in config.stages:
        present_formats(config.data.folder, split_of(stage), config.choices.files)
        store = config.data.features(stage)
        encoders.setdefault(Manifest.load(store).encoder, store)
    # The number of frames and channels is that of the videos, also in stage 1.
    encoders.setdefault(Manifest.load(config.video_features).encoder, config.video_features)
    if len(encoders) > 1:
        (one, first), (two, second) = list(encoders.items())[:2]
        raise ValueError(
            f"{first} and {second} hold features of two encoders, {one[:12]} and {two[:12]}: encode both with one CLIP, "
            "or import features of the same one with dataloaders.store import --like"
        )
    if config.model.llm != RANDOM:
        paths.model("--llm", config.model.llm)
    paths.input_folder("--init", config.run.init)
    _check_start(config)
    if isinstance(config.held_out, Path) and not config.held_out.is_file():
        raise ValueError(f"--held-out {config.held_out}: neither a share nor a file")
    paths.input_folder("--transcripts", config.data.transcripts)
    paths.output_folder("--output", config.run.output)
    if config.data.cache is not None:
        paths.output_folder("--cache", config.data.cache)


def _check_start(config: TrainConfig) -> None:
    """Raise ValueError unless the first stage of the run starts from the output of the stage before it."""
    stage = config.stages[0]
    start, wanted = config.start(stage), config.before(stage)
    if start is None:
        return
    if wanted is None:
        raise ValueError(f"--init is the output of an earlier stage, and stage {stage} has none: leave it out")
    if not (start / LINEAGE).exists():
        outputs = [path for path in (start / "final", *sorted(start.glob("stage*/final"))) if (path / LINEAGE).exists()]
        remedy = (
            f"give --init {outputs[-1]}" if outputs else f"train stage {wanted} first, or give its output with --init"
        )
        raise ValueError(f"stage {stage} starts from stage {wanted}'s output, and {start} is not one: {remedy}")
    (*_, trained) = stages(start)
    if trained != wanted:
        remedy = "; --no-trajectory-stage leaves stage 2 out" if (stage, trained) == (3, 1) else ""
        raise ValueError(f"stage {stage} starts from stage {wanted}'s output, and {start} is stage {trained}'s{remedy}")


@contextmanager
def claimed(output: Path, world: World) -> Iterator[None]:
    """Lock a run's folder for the block. Raises ValueError, on all ranks, if another run has locked it, or if it is not
    the same folder on every host."""
    with ExitStack() as held:
        world.agree_with_main(lambda: _claim(output, held))
        if world.size > 1:
            token = output / world.from_main(lambda: f".shared-{secrets.token_hex(8)}")
            world.agree_with_main(token.touch)
            try:
                world.agree(lambda: check_shared(output, token.name))
            finally:
                if world.is_main:
                    token.unlink(missing_ok=True)
        yield


def check_shared(output: Path, token: str) -> None:
    """Raise ValueError where rank 0's file `token` is not in this host's folder after `SHARED_SECONDS`."""
    until = time.monotonic() + SHARED_SECONDS
    while token not in _names(output):
        if time.monotonic() > until:
            raise ValueError(
                f"--output {output} is not the folder that rank 0 writes to: give a folder that all hosts share, which rank 0 "
                "writes and all ranks read"
            )
        time.sleep(0.1)


def _names(folder: Path) -> set[str]:
    """The names in a folder, listed anew; empty where it does not exist."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def _claim(output: Path, held: ExitStack) -> None:
    output.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(lock(output / ".lock", "make sure that no other run writes to it"))
    except BlockingIOError as error:
        raise ValueError(f"{output} is being written by another run; wait for it or choose another --output") from error
