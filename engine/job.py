"""A job: the stages of a run, all prepared before the first one trains, and how the job ends."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from pathlib import Path

import torch

from dataloaders.cli import dump
from dataloaders.errors import sentence
from dataloaders.files import directory_written_atomically
from dataloaders.settings import write_settings
from engine.agreement import check_same_command, check_same_run
from engine.build import build_model
from engine.checkpoint import check_identity, check_resumable
from engine.config import TrainConfig
from engine.distributed.errors import print_error, record_error
from engine.distributed.watchdog import print_end
from engine.distributed.world import World, use_deterministic_algorithms
from engine.identity import Identity
from engine.metrics import require_wandb
from engine.nonfinite import NonFiniteError
from engine.plots import plot_losses
from engine.preemption import write_marker
from engine.preflight import check_paths, claimed
from engine.prepare import (
    LanguageModel,
    StageInputs,
    check_held_out,
    dtype_of,
    identify,
    prepare,
    prepare_language_model,
)
from engine.recipes import Stage
from engine.run import Progress, run
from pite import checkpoint, devices
from pite.llava import PROJECTOR_FILE
from pite.model import PiTe
from pite_kernels.dispatch import backend_name

log = logging.getLogger(__name__)

SETTINGS = "config.yaml"
"""Name of the file in OUTPUT that holds the flags of the last run; `--config` reads it."""


def run_job(config: TrainConfig) -> int:
    """Train the stages of a run; returns the exit status. An expected error is one sentence, printed once per job."""
    world: World | None = None
    status, reason = 1, "an error; see the output of that rank"
    try:
        if config.run.wandb is not None:
            require_wandb()
        _check_device(config)
        if config.parallel.deterministic:
            use_deterministic_algorithms()
        world = World.join(config.parallel.device, config.parallel.stall_timeout)
        check_same_command(world, config)
        _log_machine(config, world)
        world.agree(lambda: check_paths(config))
        with claimed(config.run.output, world):
            _train_stages(config, world)
        status, reason = 0, ""
    except NonFiniteError as error:
        # All ranks raise it: rank 0 prints it, and all leave together.
        if world is None or world.is_main:
            print(f"engine.train: {error}", file=sys.stderr)
        record_error(f"engine.train: {error}")
        reason = ""
    except torch.OutOfMemoryError as error:
        print_error("engine.train", f"{error}\nLower --token-budget, which is one micro-batch's computed rows.")
        reason = "out of memory"
    except (ValueError, OSError) as error:
        reason = sentence(error)
        print_error("engine.train", reason)
    except RuntimeError:
        # The error of a failed collective does not name its cause. The watchdog may have found it.
        cause = world.watchdog.diagnose() if world is not None and world.watchdog is not None else None
        if world is None or cause is None:
            raise
        print_end(f"rank {world.rank} ends: {cause}")
        reason = cause
    finally:
        if world is not None:
            world.leave(reason or None)
    return status


def _train_stages(config: TrainConfig, world: World) -> None:
    """Prepare all stages, then train them in order, until a stage is stopped early."""
    world.set_status("checking the language model")
    llm = prepare_language_model(config, world)
    waiting = [_prepared(config, stage, llm, world) for stage in config.stages]
    if isinstance(config.held_out, Path):
        check_held_out(config.held_out, [inputs.held_out for inputs in waiting])
    while waiting:
        # Not kept in a loop variable of the whole list: a stage's data are freed after it.
        progress = train_stage(config, waiting.pop(0), world)
        if progress.stop_requested and waiting and progress.done:
            log.info("stopping before the next stage, as requested")
        if progress.stop_requested and world.is_main and (waiting or not progress.done):
            write_marker(config.run.output, config.stages[-len(waiting) - 1], progress.step)
        if progress.stop_requested or not progress.done:
            return


def _prepared(config: TrainConfig, stage: Stage, llm: LanguageModel, world: World) -> StageInputs:
    try:
        return prepare(config, stage, llm, world)
    except ValueError as error:
        raise ValueError(f"stage {stage}: {error}") from error


def train_stage(config: TrainConfig, inputs: StageInputs, world: World) -> Progress:
    """Train one prepared stage to its end, until a signal to stop, or up to `--max-steps`."""
    stage = inputs.stage
    world.set_status(f"comparing stage {stage} with what is in its folder")
    directory = config.run.directory(stage)
    identity, merged = identify(config, inputs, world)
    found: list[int | None] = []
    world.agree_with_main(lambda: found.append(_finished_steps(directory / "final", identity)))
    steps = world.from_main(lambda: found[0])
    if steps is not None:
        log.info("stage %s is done: %s", stage, directory / "final")
        return Progress(steps, done=True, stop_requested=False)
    check_same_run(world, identity, inputs.layout, inputs.total)
    world.agree(lambda: check_resumable(directory / "checkpoints", identity.as_dict()))
    world.set_status(f"building the model of stage {stage}")
    # A compiled or sharded model of the stage before is part of reference cycles.
    gc.collect()
    model = build_model(
        stage, inputs.recipe, inputs.model, llm=inputs.llm.directory, merged=merged, dataset=inputs.dataset,
        store=inputs.store, seed=config.optimization.seed, dtype=inputs.dtype,
        fp8=config.model.frozen_dtype == "fp8", world=world, layout=inputs.layout,
    )  # fmt: skip
    if config.parallel.compile:
        model.decoder.compile_layers()
    if world.is_main:
        # Only now, since a run that is refused must not change what an earlier one has written.
        write_settings(config.run.output / SETTINGS, dump(config))
        _write_left_out(inputs, directory)
    progress = run(config, inputs, model, world, identity)
    if progress.done and world.is_main:
        plot_losses({directory.name: directory / "metrics.jsonl"}, directory / "losses.png")
        _export(inputs, model, identity, merged, directory / "final", progress.step)
    world.barrier()
    return progress


def _write_left_out(inputs: StageInputs, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    inputs.dataset.write_left_out(directory / "left_out.jsonl")
    if inputs.dataset.exclusions():
        log.info("%s lists the records and samples that are left out", directory / "left_out.jsonl")


def _finished_steps(final: Path, identity: Identity) -> int | None:
    """The optimizer steps of a finished stage, None if it is not finished.

    Raises ResumeError if it was made of something else.
    """
    if not (final / checkpoint.LINEAGE).exists():
        return None
    lineage = checkpoint.read_lineage(final)
    check_identity(lineage["made_of"], identity.as_dict(), final)
    return int(lineage["steps"])


def _export(inputs: StageInputs, model: PiTe, identity: Identity, merged: list[str], final: Path, steps: int) -> None:
    """Write a finished stage's adapter, heads, tokenizer and lineage."""
    llm = inputs.llm
    if llm.directory is None:
        log.info("stage %s is done: random weights are not exported", inputs.stage)
        return
    base = str(llm.directory) if Path(llm.name).expanduser().is_dir() else llm.name
    lineage = {
        "stage": inputs.stage,
        "language_model": base,
        "merged": merged,
        "steps": steps,
        "made_of": identity.as_dict(),
    }
    with directory_written_atomically(final, alone=True) as temporary:
        llm.tokenizer.save_pretrained(str(temporary))
        checkpoint.save_stage(model, temporary, lineage)
        if model.config.choices.marks:
            checkpoint.save_projector(model, llm.directory, temporary / PROJECTOR_FILE)
    log.info("stage %s is done: %s", inputs.stage, final)


def _check_device(config: TrainConfig) -> None:
    """Raise ValueError where no GPU can be used, without --device cpu: a large model would take months on a CPU."""
    if config.parallel.device is not None or torch.cuda.is_available():
        return
    why = devices.unusable_gpu()
    if why is None and config.model.size != "tiny":
        why = f"there is no NVIDIA GPU here, and --model {config.model.size} is trained on one"
    if why is not None:
        raise ValueError(f"{why}; --device cpu trains on the CPU")


def _log_machine(config: TrainConfig, world: World) -> None:
    """Log what trains: ranks, hosts, device, dtype, versions, kernels."""
    hosts = sorted(set(world.gather(socket.gethostname())))
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"a CPU, {torch.get_num_threads()} threads each"
    dtype = dtype_of(config, world.device)
    log.info(
        "%s rank%s on %s host%s (%s), %s; %s, losses by %s; torch %s, OMP_NUM_THREADS %s",
        world.size, "s" * (world.size > 1), len(hosts), "s" * (len(hosts) > 1), ", ".join(hosts), device,
        str(dtype).removeprefix("torch."), backend_name(world.device, dtype), torch.__version__,
        os.environ.get("OMP_NUM_THREADS", "not set"),
    )  # fmt: skip
