"""python -m engine.train --stage 1|2|3|all --model tiny|7b|13b --data DIR --store DIR --output DIR

Each stage starts from the previous one, with its LoRA merged and a new LoRA on top, and writes OUTPUT/stageN/final. The
same command resumes an interrupted run, and reports a finished one as done.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dataloaders.files import directory_written_atomically, sha256
from dataloaders.ranks import Ranks
from dataloaders.samples.dataset import StageDataset
from dataloaders.samples.plan import BatchPlan
from dataloaders.store.features import FeatureStore, Manifest
from engine import budget
from engine.batches import StepSource
from engine.build import (
    RANDOM,
    build_model,
    language_model_checksum,
    load_tokenizer,
    merged_stages,
    model_config,
    random_shape,
)
from engine.checkpoint import check_fingerprint, check_resumable
from dataloaders.cli import parse
from engine.config import TrainConfig
from engine.distributed.errors import exit_process, print_error
from engine.distributed.watchdog import print_end
from engine.distributed.world import World
from engine.hardware import capacity_of
from engine.layout import choose_layout, count_parameters
from engine.loop import NonFiniteError
from engine.metrics import require_wandb
from engine.plots import plot_losses
from engine.preemption import remove_marker, write_marker
from engine.preflight import agree, agree_with_main, check_encoded, check_fp8, check_given, check_tokens, claimed
from engine.recipes import LANGUAGE_MODELS, Recipe, Stage
from engine.run import run
from pite import checkpoint
from pite.config import PiTeConfig
from pite_kernels.attention import choose_backend

_RECIPE_FIELDS = tuple(f.name for f in fields(Recipe) if f.name not in ("trainable_modules", "head"))


def main(argv: list[str] | None = None) -> int:
    config = parse(TrainConfig, argv, prog="python -m engine.train")
    if config.dry_run:
        return budget.main(argv)
    world: World | None = None
    status = 1
    leave_reason: str | None = "an error; see the output of that rank"
    try:
        if config.wandb is not None:
            require_wandb()
        if Ranks.read().rank == 0:
            remove_marker(config.output)
        world = World.join(config.device, config.stall_timeout)
        agree(world, lambda: check_given(config))
        with claimed(config.output, world):
            for stage in config.stages:
                progress = train_stage(config, stage, world)
                finished = progress.done and stage == config.stages[-1]
                if progress.stop_requested and world.is_main and not finished:
                    write_marker(config.output, stage, progress.step)
                if progress.stop_requested or not progress.done:
                    break
        status, leave_reason = 0, None
    except NonFiniteError as error:
        # All ranks raise it: rank 0 prints it, and all leave together.
        if world is None or world.is_main:
            print(f"engine.train: {error}", file=sys.stderr)
        leave_reason = None
    except torch.OutOfMemoryError as error:
        print_error("engine.train", f"{error}\nLower --token-budget, which is one micro-batch's tokens.")
        leave_reason = "out of memory"
    except (ValueError, OSError) as error:
        print_error("engine.train", str(error))
        leave_reason = str(error)
    except RuntimeError:
        # The error of a failed collective does not name its cause. The watchdog may have found it.
        cause = world.watchdog.diagnose() if world is not None and world.watchdog is not None else None
        if world is None or cause is None:
            raise
        print_end(f"rank {world.rank} ends: {cause}")
        leave_reason = cause
    finally:
        if world is not None:
            world.leave(leave_reason)
    return status


class Progress(NamedTuple):
    """The progress of a stage.

    step            optimizer steps done
    done            whether those are all of the stage
    stop_requested  whether any rank got a signal to stop
    """

    step: int
    done: bool
    stop_requested: bool


def train_stage(config: TrainConfig, stage: Stage, world: World) -> Progress:
    """Train one stage to its end, until a signal to stop, or up to `--max-steps`."""
    world.set_status(f"checking the inputs of stage {stage}")
    directory = config.output / f"stage{stage}"
    final = directory / "final"
    recipe = config.recipe(stage)
    llm_name = config.llm or LANGUAGE_MODELS[config.model]
    llm = None if llm_name == RANDOM else checkpoint.resolve(llm_name)
    pite_config = _model_config(config, llm)
    dtype = config.torch_dtype(world.device)
    fp8 = config.frozen_dtype == "fp8"
    if fp8:
        agree(world, lambda: check_fp8(world, dtype))
    same_as_before = {
        "language model": f"random {config.model}, seed {config.seed}"
        if llm is None
        else world.from_main(lambda: language_model_checksum(llm)),
        **{f"language model's {name}": value for name, value in pite_config.arithmetic.items()},
        "frames and points": [pite_config.num_frames, pite_config.num_points],
    }
    merged = merged_stages(stage, config.start(stage), same_as_before)
    settings = {
        **same_as_before,
        "features": asdict(Manifest.load(config.features(stage))),
        "earlier stages": [
            sha256(Path(path) / file) for path in merged for file in (checkpoint.ADAPTER_FILE, checkpoint.HEADS_FILE)
        ],
        "seed": config.seed,
        "absent": config.absent,
        "trajectory normalizer": config.trajectory_normalizer,
        "head initialisation": config.head_init,
        "dtype": str(dtype) if config.frozen_dtype is None else f"{dtype}, frozen weights {config.frozen_dtype}",
        **{name.replace("_", " "): getattr(recipe, name) for name in _RECIPE_FIELDS},
    }
    if (final / checkpoint.LINEAGE).exists():
        lineage = checkpoint.read_lineage(final)
        check_fingerprint({name: lineage["made_of"].get(name) for name in settings}, settings, final)
        world.log_rank0(f"stage {stage} is done: {final}")
        return Progress(lineage["steps"], True, False)

    world.set_status(f"reading the data of stage {stage}")
    tokenizer = load_tokenizer(llm or RANDOM)
    store = FeatureStore(config.features(stage))
    dataset = _open_dataset(config, stage, world, tokenizer, pite_config, store)
    left_out = directory / "left_out.jsonl"
    note = f"; they are listed in {left_out}" if dataset.exclusions() else ""
    world.log_rank0(f"stage {stage}: {dataset.summary()}{note}")
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        dataset.write_left_out(left_out)
    check_encoded(dataset, config.store)
    check_tokens(dataset, tokenizer, pite_config, lambda warning: world.log_rank0(f"stage {stage}: {warning}"))
    layout = choose_layout(
        pite_config,
        count_parameters(pite_config, recipe),
        # All ranks have one layout: that of the smallest device.
        min(world.gather(capacity_of(world.device)), key=lambda capacity: capacity or 0.0),
        ranks=world.size,
        width=dtype.itemsize,
        fp8=fp8,
        parallel=config.parallel,
        recompute=config.recompute,
        token_budget=config.token_budget,
        longest=int(dataset.tokens.max()),
    )
    llm_config = pite_config.llm
    attention = choose_backend(
        world.device, dtype, llm_config.num_attention_heads, llm_config.num_key_value_heads, pite_config.head_dim
    )
    world.log_rank0(f"stage {stage}: {layout.describe(llm_config.num_hidden_layers)}, attention by {attention}")
    if dataset.tokens.max() > layout.token_budget:
        raise ValueError(
            f"the longest sample has {dataset.tokens.max():,} tokens and a micro-batch holds {layout.token_budget:,}: "
            "lower --max-length or raise --token-budget"
        )
    plan = BatchPlan(len(dataset), recipe.global_batch, config.seed, dataset.groups() if recipe.group_media else None)
    if plan.left_over:
        world.log_rank0(
            f"stage {stage}: dropping the last incomplete batch ({plan.left_over} of {len(dataset):,} samples, "
            "different ones in each epoch)"
        )
    source = StepSource(
        dataset,
        plan,
        store,
        token_budget=layout.token_budget,
        rank=world.rank,
        ranks=world.size,
        absent=config.absent,
        normalizer=config.trajectory_normalizer,
        pin_memory=world.device.type == "cuda",
    )
    fingerprint = {
        **settings,
        "data": dataset.fingerprint(),
        "feature records": world.from_main(lambda: store.fingerprint(dataset.media)),
        "left out": dataset.exclusions() or None,
    }
    agree(world, lambda: check_resumable(directory / "checkpoints", fingerprint))
    total = plan.steps_per_epoch * recipe.epochs
    if config.profile is not None and config.profile[0] > total:
        raise ValueError(f"--profile starts at step {config.profile[0]}, and stage {stage} has {total}")
    world.set_status(f"building the model of stage {stage}")
    model = build_model(
        stage, recipe, pite_config, llm=llm, merged=merged, dataset=dataset, store=store, seed=config.seed,
        head_init=config.head_init, dtype=dtype, fp8=fp8, world=world, layout=layout,
    )  # fmt: skip
    if config.compile:
        model.decoder.compile_layers()
    done, stop_requested = run(config, recipe, model, source, world, directory, total, fingerprint)
    progress = Progress(done, done == total, stop_requested)
    if not progress.done:
        return progress
    if world.is_main:
        plot_losses({directory.name: directory / "metrics.jsonl"}, directory / "losses.png")
    if llm is None:
        world.log_rank0(f"stage {stage} is done: random weights are not exported")
        return progress
    if world.is_main:
        base = str(llm) if Path(llm_name).expanduser().is_dir() else llm_name
        lineage = {"stage": stage, "language_model": base, "merged": merged, "steps": done, "made_of": fingerprint}
        with directory_written_atomically(final, alone=True) as temporary:
            tokenizer.save_pretrained(str(temporary))
            checkpoint.save_stage(model, temporary, lineage)
    world.log_rank0(
        f"stage {stage} is done: {final}" + ("; stopping before the next stage, as requested" if stop_requested else "")
    )
    world.barrier()
    return progress


def _open_dataset(
    config: TrainConfig,
    stage: Stage,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    pite_config: PiTeConfig,
    store: FeatureStore,
) -> StageDataset:
    """The stage's training set. Rank 0 alone tokenizes it, since file locks do not work on every file system.

    Raises ValueError, on all ranks, if rank 0 cannot make it.
    """

    def open_it() -> None:
        opened.append(
            StageDataset(
                config.data,
                stage,
                tokenizer,
                num_frames=pite_config.num_frames if stage > 1 else 1,
                num_points=pite_config.num_points if stage > 1 else 1,
                max_length=config.max_length,
                available=store,
                cache=config.samples,
                failure_budget=config.failure_budget,
                turn=config.turn,
                narrative_timing=config.narrative_timing,
            )
        )

    opened: list[StageDataset] = []
    agree_with_main(world, open_it)
    # The other ranks find what rank 0 made in the cache, unless each machine has a cache of its own.
    agree(world, lambda: None if world.is_main else open_it())
    return opened[0]


def _model_config(config: TrainConfig, llm: Path | None) -> PiTeConfig:
    if llm is not None:
        return model_config(llm, config.store, config.num_points)
    manifest = Manifest.load(config.store / "videos")
    return random_shape(config.model, config.num_points, manifest.tokens, manifest.channels)


if __name__ == "__main__":
    exit_process(main())
