"""Checks of a run's inputs, before anything large is downloaded or read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dataloaders.failures import LEDGER, read_failures
from dataloaders.formats import present_formats, split_of
from dataloaders.locks import lock
from dataloaders.samples.dataset import StageDataset
from dataloaders.store.features import Manifest
from engine.config import TrainConfig
from engine.distributed.world import World
from pite.config import PiTeConfig
from pite.tokenizers import check_vocabulary
from pite_kernels.fp8 import why_unsupported


def agree(world: World, check: Callable[[], None]) -> None:
    """Run a check on every rank. If it fails on any, all raise the same ValueError, with the rank unless all fail."""
    every = world.gather(_failure(check))
    for rank, sentence in enumerate(every):
        if sentence is not None:
            raise ValueError(sentence if set(every) == {sentence} else f"rank {rank}: {sentence}")


def agree_with_main(world: World, check: Callable[[], None]) -> None:
    """Run a check on rank 0 alone. If it fails, all ranks raise the same ValueError."""
    failed = world.from_main(lambda: _failure(check))
    if failed is not None:
        raise ValueError(failed)


def _failure(check: Callable[[], None]) -> str | None:
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def check_given(config: TrainConfig) -> None:
    """Raise ValueError or OSError if the data or features of any stage of the run are missing."""
    for stage in config.stages:
        present_formats(config.data, split_of(stage))
        Manifest.load(config.features(stage))


@contextmanager
def claimed(output: Path, world: World) -> Iterator[None]:
    """Lock a run's folder for the block. Raises ValueError, on all ranks, if another run has locked it."""
    with ExitStack() as held:
        agree_with_main(world, lambda: _claim(output, held))
        yield


def _claim(output: Path, held: ExitStack) -> None:
    output.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(lock(output / ".lock", "make sure that no other run writes to it"))
    except BlockingIOError as error:
        raise ValueError(f"{output} is being written by another run; wait for it or choose another --output") from error


def check_fp8(world: World, dtype: torch.dtype) -> None:
    """Raise ValueError if the device or dtype does not support --frozen-dtype fp8."""
    why = why_unsupported(world.device)
    if why is not None:
        raise ValueError(f"--frozen-dtype fp8: {why}; leave the flag out")
    if world.device.type == "cuda" and dtype != torch.bfloat16:
        raise ValueError("--frozen-dtype fp8 on CUDA needs bfloat16: leave --dtype out")
    if world.device.type == "cpu":
        world.log_rank0("a CPU emulates fp8: its rounding, not its speed")


def check_tokens(
    dataset: StageDataset, tokenizer: PreTrainedTokenizerBase, config: PiTeConfig, warn: Callable[[str], None]
) -> None:
    """Raise ValueError if a sample has a token without an embedding in the language model.

    warn  called with a warning if a sample is longer than the language model's context
    """
    worst = int(dataset.largest_tokens.argmax())
    check_vocabulary(
        int(dataset.largest_tokens[worst]), tokenizer, config.llm.vocab_size, f"sample {dataset.ids[worst]!r}"
    )
    if warning := config.beyond_context(int(dataset.tokens.max())):
        warn(f"{warning}; --max-length {config.context_length} leaves such samples out")


def check_encoded(dataset: StageDataset, store: Path) -> None:
    """Raise ValueError if media are missing from the store but not in its ledger of failures."""
    failed = {failure.id for failure in read_failures(store / LEDGER)}
    missing = sorted(set(dataset.not_encoded) - failed)
    if missing:
        raise ValueError(
            f"{len(missing):,} media, {missing[0]!r} among them, are neither in the feature store {store} nor in its "
            "ledger of failures; run engine.encode first (for imported features, dataloaders.store import --data)"
        )
