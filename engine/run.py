"""One stage's run: resume where the last checkpoint is, train, write checkpoints, leave in good order."""

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
from engine import checkpoint as state
from engine.batches import Absent, StepSource
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
    """Resume, train and checkpoint one stage; returns the steps done, and whether any rank was asked to stop.

    directory    of the stage: checkpoints, metrics and profiles are made in it
    total        steps of the stage's schedule
    fingerprint  what the run is made of; a checkpoint of another is refused
    """
    parameters = dict(model.trainable())
    optimizer = make_optimizer(model, recipe)
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    continued, complaints = resume_point(checkpoints, config.start_over_if_damaged, world)
    start = 0
    if continued is not None:
        state.restore(continued, parameters, optimizer, fingerprint)
        start = continued.step
    stop = total if config.max_steps is None else max(start, min(total, config.max_steps))
    with (
        InterruptFlag(among_others=world.size > 1) as interrupted,
        Metrics(
            directory if world.is_main else None, start=start, total=stop, title=directory.name, wandb=config.wandb
        ) as metrics,
        state.Writer(checkpoints, fingerprint, config.keep_checkpoints, continued) as writer,
        Profile(directory / "profile", config.profile, world, start) as profile,
    ):
        for text in complaints:
            metrics.say(text)
        if start:
            metrics.say(f"continuing after step {start} of {stop}")

        asked = False

        def after_step(done: int, finish: Callable[[], None], stopping: bool) -> bool:
            nonlocal asked
            asked = stopping
            profile.after_step(done)
            writer.check()
            if stopping or done % config.checkpoint_every == 0 or done == stop:
                # What a step did is known to be finite before it is saved.
                finish()
                if world.is_main:
                    world.doing(f"saving step {done}")
                    writer.save(done, parameters, optimizer)
            return stopping or done == stop

        def blame(step: int) -> list[str]:
            batches = list(source.singles(step))
            # Sharded weights are gathered by all ranks together, so that all compute equally often.
            rounds = max(world.gather(len(batches)))
            idle = source.step(step).micro_batches[:1] * (rounds - len(batches))
            found = [finite(model, batch, recipe, config.absent) for batch in (*batches, *idle)]
            return [batch.sample_ids[0] for batch, good in zip(batches, found) if not good]

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
                    blame=blame,
                    efficiency=efficiency(model.config, recipe, world),
                )
            # In the last step too, of which no other tells the ranks.
            asked = any(world.gather(asked or interrupted.set))
        finally:
            if world.watch is not None:
                world.watch.rest()
    if done < total:
        if asked:
            by = interrupted.by or "by another rank"
            world.say(
                f"asked to stop ({by}): saved step {done} of {total} in {checkpoints}; the same command continues"
            )
        else:
            world.say(
                f"stopped after step {done} of {total}, as --max-steps says, and saved in {checkpoints}; "
                "the same command with more of them continues"
            )
    return done, asked


def resume_point(checkpoints: Path, start_over: bool, world: World) -> tuple[state.Checkpoint | None, list[str]]:
    """`state.resume_point` of rank 0, on all ranks: all start from the same, and one renames."""
    found: list[tuple[state.Checkpoint | None, list[str]]] = []
    agree_with_main(world, lambda: found.append(state.resume_point(checkpoints, start_over)))
    return world.from_main(lambda: found[0])


@contextmanager
def collector_frozen() -> Iterator[None]:
    """Keep Python's garbage collector from scanning everything that lives as long as the run anyway."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def finite(model: PiTe, batch: PackedBatch, recipe: Recipe, absent: Absent) -> bool:
    """Whether one sample alone has a finite loss and finite gradients."""
    losses = compute_losses(model, batch.to(model.device), recipe, absent)
    parameters = [p for _, p in model.trainable()]
    gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
    return all(bool(torch.isfinite(t).all()) for t in (losses.total, *gradients) if t is not None)


class InterruptFlag:
    """Within its block SIGTERM (preemption) and a first Ctrl-C set the flag, and `by`, instead of ending the process.

    among_others  keep it so after an error or a stop: torchrun sends SIGTERM as soon as another rank is gone, when this
                  one has yet to say which, and again where a scheduler has signalled every process
    """

    def __init__(self, among_others: bool = False) -> None:
        self.set = False
        self.by = ""
        self._among_others = among_others

    def _raise(self, number: int, _: object) -> None:
        if self.set:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.set, self.by = True, signal.Signals(number).name

    def __enter__(self) -> InterruptFlag:
        self._before = {number: signal.signal(number, self._raise) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._among_others and (kind is not None or self.set):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
