"""The run of one stage: resume from the last checkpoint, train, write checkpoints, end cleanly."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataloaders.samples.batch import PackedBatch
from dataloaders.samples.prefetch import prefetch
from engine.batches import Absent, StepSource
from engine.checkpoint import Checkpoint, CheckpointWriter, restore_checkpoint, resume_point
from engine.distributed.world import World
from engine.hardware import efficiency
from engine.loop import compute_losses, make_optimizer, train
from engine.metrics import Metrics
from engine.preflight import agree_with_main
from engine.profile import Profile
from engine.recipes import Recipe
from pite.model import PiTe

if TYPE_CHECKING:
    from engine.config import TrainConfig


def run(
    config: TrainConfig,
    recipe: Recipe,
    model: PiTe,
    source: StepSource,
    world: World,
    directory: Path,
    total: int,
    fingerprint: dict[str, Any],
) -> tuple[int, bool]:
    """Resume, train and checkpoint one stage; returns the steps done, and whether any rank got a signal to stop.

    directory    the stage's: checkpoints, metrics and profiles are made in it
    total        steps of the stage's schedule
    fingerprint  the run's inputs and settings; a checkpoint with another fingerprint is refused
    """
    parameters = dict(model.trainable())
    optimizer = make_optimizer(model, recipe)
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    continued, messages = shared_resume_point(checkpoints, config.start_over_if_damaged, world)
    start = 0
    if continued is not None:
        restore_checkpoint(continued, parameters, optimizer, fingerprint)
        start = continued.step
    stop = total if config.max_steps is None else max(start, min(total, config.max_steps))
    with (
        InterruptFlag(distributed=world.size > 1) as interrupted,
        Metrics(
            directory if world.is_main else None, start=start, total=stop, title=directory.name, wandb=config.wandb
        ) as metrics,
        CheckpointWriter(checkpoints, fingerprint, config.keep_checkpoints, continued) as writer,
        Profile(directory / "profile", config.profile, world, start) as profile,
    ):
        for text in messages:
            metrics.write(text)
        if start:
            metrics.write(f"continuing after step {start} of {stop}")

        stop_requested = False

        def after_step(done: int, finish: Callable[[], None], stopping: bool) -> bool:
            nonlocal stop_requested
            stop_requested = stopping
            profile.after_step(done)
            writer.check()
            if stopping or done % config.checkpoint_every == 0 or done == stop:
                # Wait for the step's numbers: only steps with a finite loss and gradient are saved.
                finish()
                if world.is_main:
                    world.set_status(f"saving step {done}")
                    writer.save(done, parameters, optimizer)
            return stopping or done == stop

        def find_nonfinite_samples(step: int) -> list[str]:
            batches = list(source.singles(step))
            # All ranks gather sharded weights together, so all must compute equally often: `padding` is computed too.
            rounds = max(world.gather(len(batches)))
            padding = source.step(step).micro_batches[:1] * (rounds - len(batches))
            results = [is_finite(model, batch, recipe, config.absent) for batch in (*batches, *padding)]
            return [batch.sample_ids[0] for batch, finite in zip(batches, results) if not finite]

        try:
            with collector_frozen():
                done = train(
                    model,
                    optimizer,
                    prefetch(source.step, range(start, stop), config.workers),
                    recipe,
                    world,
                    metrics,
                    start=start,
                    stop=stop,
                    total=total,
                    absent=config.absent,
                    interrupted=lambda: interrupted.set,
                    after_step=after_step,
                    find_nonfinite_samples=find_nonfinite_samples,
                    efficiency=efficiency(model.config, recipe, world),
                )
            # The ranks agree on a stop one step later. After the last step this gather does it.
            stop_requested = any(world.gather(stop_requested or interrupted.set))
        finally:
            if world.watchdog is not None:
                world.watchdog.pause()
    if done < total:
        if stop_requested:
            signal_name = interrupted.signal_name or "on another rank"
            world.log_rank0(
                f"stop requested ({signal_name}): saved step {done} of {total} in {checkpoints}; "
                "the same command continues"
            )
        else:
            world.log_rank0(
                f"stopped after step {done} of {total}, because of --max-steps, and saved in {checkpoints}; "
                "the same command with a larger --max-steps continues"
            )
    return done, stop_requested


def shared_resume_point(checkpoints: Path, start_over: bool, world: World) -> tuple[Checkpoint | None, list[str]]:
    """`resume_point` on rank 0, its result on all ranks: all start from the same checkpoint, and only one renames."""
    found: list[tuple[Checkpoint | None, list[str]]] = []
    agree_with_main(world, lambda: found.append(resume_point(checkpoints, start_over)))
    return world.from_main(lambda: found[0])


@contextmanager
def collector_frozen() -> Iterator[None]:
    """Keep Python's garbage collector from scanning the objects that live as long as the run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_finite(model: PiTe, batch: PackedBatch, recipe: Recipe, absent: Absent) -> bool:
    """Whether the loss and the gradients of one sample alone are finite."""
    losses = compute_losses(model, batch.to(model.device), recipe, absent)
    parameters = [p for _, p in model.trainable()]
    gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
    return all(bool(torch.isfinite(t).all()) for t in (losses.total, *gradients) if t is not None)


class InterruptFlag:
    """Within its block SIGTERM (preemption) and a first Ctrl-C set the flag and `signal_name`; the process goes on.

    distributed  stay in effect after an error or a stop. torchrun sends SIGTERM as soon as another rank is gone, before
                 this rank has printed which one; and once more where a scheduler has signalled every process
    """

    def __init__(self, distributed: bool = False) -> None:
        self.set = False
        self.signal_name = ""
        self._distributed = distributed

    def _raise(self, number: int, _: object) -> None:
        if self.set:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.set, self.signal_name = True, signal.Signals(number).name

    def __enter__(self) -> InterruptFlag:
        self._before = {number: signal.signal(number, self._raise) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._distributed and (kind is not None or self.set):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
