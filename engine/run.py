"""The run of one stage: resume from the last checkpoint, train, validate, write checkpoints, end cleanly."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from dataloaders.samples.prefetch import prefetch
from engine.agreement import check_same_weights
from engine.checkpoint import Checkpoint, CheckpointWriter, restore_checkpoint, resume_point
from engine.config import TrainConfig
from engine.distributed.world import World
from engine.hardware import efficiency
from engine.identity import Identity
from engine.loop import make_optimizer, train
from engine.metrics import Metrics
from engine.nonfinite import raise_nonfinite
from engine.prepare import StageInputs
from engine.profile import Profile
from engine.report import Reporter
from engine.validation import Validation
from pite.model import PiTe

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """The progress of a stage.

    step            optimizer steps done
    done            whether those are all of the stage
    stop_requested  whether any rank got a signal to stop
    """

    step: int
    done: bool
    stop_requested: bool


def run(config: TrainConfig, inputs: StageInputs, model: PiTe, world: World, identity: Identity) -> Progress:
    """Resume, train and checkpoint one stage, until its end, a signal to stop, or `--max-steps`."""
    directory, recipe, total = config.run.directory(inputs.stage), inputs.recipe, inputs.total
    parameters, optimizer = dict(model.trainable()), make_optimizer(model, recipe)
    made_of, checkpoints = identity.as_dict(), directory / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    resumed, start = _shared_resume_point(checkpoints, config.run.start_over_if_damaged, world), 0
    if resumed is not None:
        restore_checkpoint(resumed, parameters, optimizer, made_of)
        start = resumed.step
    check_same_weights(world, model, start)
    stop = total if config.run.max_steps is None else max(start, min(total, config.run.max_steps))
    if start:
        log.info("continuing after step %s of %s", start, stop)
    source, step, stopping = inputs.source(world), start, False
    with (
        InterruptFlag(distributed=world.size > 1) as interrupt,
        Metrics(
            directory if world.is_main else None, start=start, total=stop, title=directory.name, wandb=config.run.wandb
        ) as metrics,
        CheckpointWriter(checkpoints, made_of, config.run.keep_checkpoints, resumed) as writer,
        Profile(directory / "profile", config.run.profile, world, start) as profile,
        _undisturbed(world),
    ):
        reporter = Reporter(
            world,
            metrics,
            on_nonfinite=lambda result: raise_nonfinite(result, model, source, recipe, world),
            efficiency=efficiency(model.config, recipe, world),
            validation=_validation(config, inputs, model, world, stop),
        )
        batches = prefetch(source.step, range(start, stop), config.parallel.workers)
        steps = train(
            model, optimizer, batches, recipe, world,
            start=start, stop=stop, total=total, stop_requested=lambda: interrupt.set,
            reduce_dtype=torch.bfloat16 if config.parallel.reduce_dtype == "bfloat16" else None,
        )  # fmt: skip
        with closing(steps), closing(batches):
            for result in steps:
                step = result.step
                profile.after_step(step)
                writer.check()
                # Only steps with a finite loss and gradient are saved: wait for their numbers.
                save = step % config.run.checkpoint_every == 0 or step == stop
                stopping = reporter.add(result, now=save)
                if save or stopping:
                    check_same_weights(world, model, step)
                    if world.is_main:
                        world.set_status(f"saving step {step}")
                        writer.save(step, parameters, optimizer)
                if stopping:
                    break
        # The ranks agree on a stop one step later. After the last step this gather does it.
        stopping = any(world.gather(stopping or interrupt.set))
    if step < total:
        why = f"stop requested ({interrupt.name or 'on another rank'})" if stopping else "--max-steps reached"
        log.info("%s: saved step %s of %s in %s; the same command%s continues", why, step, total, checkpoints,
                 "" if stopping else " with a larger --max-steps")  # fmt: skip
    return Progress(step, step == total, stopping)


def _shared_resume_point(checkpoints: Path, start_over: bool, world: World) -> Checkpoint | None:
    """`resume_point` on rank 0, its result on all ranks: all start from the same checkpoint, and only one renames."""
    found: list[tuple[Checkpoint | None, list[str]]] = []
    world.agree_with_main(lambda: found.append(resume_point(checkpoints, start_over)))
    resumed, warnings = world.from_main(lambda: found[0])
    for text in warnings if world.is_main else ():
        log.warning("%s", text)
    return resumed


def _validation(config: TrainConfig, inputs: StageInputs, model: PiTe, world: World, last: int) -> Validation | None:
    source = inputs.validation_source(world)
    if source is None or config.run.validate_every is None:
        return None
    return Validation(
        model, source, inputs.recipe, world,
        every=config.run.validate_every, last=last, workers=config.parallel.workers,
    )  # fmt: skip


@contextmanager
def _undisturbed(world: World) -> Iterator[None]:
    """Keep Python's garbage collector from scanning the objects that live as long as the run.

    At the end the watchdog no longer expects steps.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if world.watchdog is not None:
            world.watchdog.pause()


class InterruptFlag:
    """Within its block SIGTERM (preemption) and a first Ctrl-C set the flag and `name`; the process goes on.

    distributed  stay in effect after an error or a stop. torchrun sends SIGTERM as soon as another rank is gone, before
                 this rank has printed which one; and once more where a scheduler has signalled every process
    """

    def __init__(self, distributed: bool = False) -> None:
        self.set = False
        self.name = ""
        self._distributed = distributed

    def _raise(self, number: int, _: object) -> None:
        if self.set:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.set, self.name = True, signal.Signals(number).name

    def __enter__(self) -> InterruptFlag:
        self._before = {number: signal.signal(number, self._raise) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._distributed and (kind is not None or self.set):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
