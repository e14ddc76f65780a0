"""python -m engine.train --stage 1|2|3|all --model tiny|7b|13b --data DIR --store DIR --output DIR

Each stage starts from the one before (its LoRA merged, a new one on top) and leaves OUTPUT/stageN/final. The same
command again continues where it was stopped, or says that it is done.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, cast

import torch

from dataloaders.dataset import StageDataset
from dataloaders.files import directory_written_atomically, sha256
from dataloaders.formats import NarrativeTiming, TurnChoice
from dataloaders.ledger import LEDGER, read_failures
from dataloaders.plan import BatchPlan
from dataloaders.store import FeatureStore, Manifest
from engine import budget, state
from engine.build import (
    RANDOM,
    build_model,
    language_model_checksum,
    load_tokenizer,
    merged_stages,
    model_config,
    random_shape,
)
from engine.config import parse
from engine.data import Absent, Normalizer, StepSource
from engine.loop import NonFiniteError
from engine.memory import Parallel, choose_layout, count_parameters
from engine.metrics import require_wandb
from engine.parallel import World
from engine.plots import plot_losses
from engine.recipes import LANGUAGE_MODELS, Recipe, Size, Stage, recipe
from engine.run import run
from engine.watch import say_end
from kernels.fp8 import why_unsupported
from pite import checkpoint
from pite.config import PiTeConfig


@dataclass(frozen=True)
class TrainConfig:
    """Train PiTe's three stages. A flag left out takes the stage's recipe (engine/recipes.py, the paper's table)."""

    data: Path = Path("data")
    """folder of stage1/, stage2/, stage3/ in the layout of docs/data.md"""
    store: Path = Path("features")
    """feature store that engine.encode made of that folder"""
    output: Path = Path("runs/pite")
    """where stage1/, stage2/, stage3/ are written; an interrupted run there is continued"""
    stage: Literal["1", "2", "3", "all"] = "all"
    """which stage to train"""
    trajectory_stage: bool = True
    """without it, stage 3 starts from stage 1 and `all` leaves stage 2 out (the paper's ablation)"""
    model: Size = "7b"
    """size of the language model: Vicuna v1.5 7b or 13b, or the miniature of the demo"""
    llm: str | None = None
    """directory or Hugging Face name of the language model, the size's Vicuna v1.5 unless given; `random` for random
    weights of the size's shape: a throughput run that needs no earlier stage and exports nothing"""
    init: Path | None = None
    """output of an earlier stage to start from, instead of OUTPUT's previous stage"""
    num_points: int = 3
    """P, key points per object"""
    max_length: int = 2048
    """tokens of the longest sample; longer ones are left out, counted and reported"""
    failure_budget: float = 0.01
    """share of a stage's records that may be malformed; they are left out and listed in OUTPUT/stageN/left_out.jsonl"""
    turn: TurnChoice = "first"
    """which turn of a Valley conversation is learned; `any` is one that its text decides, the same in every run"""
    narrative_timing: NarrativeTiming = "words"
    """find a narrative's utterances in its caption by their words, or by their relative position"""
    token_budget: int | None = None
    """most tokens of a micro-batch on one device; what its memory holds, up to 16384, unless given; 1024 on a CPU"""
    epochs: int | None = None
    """passes over the data"""
    max_steps: int | None = None
    """stop after this many optimizer steps of a stage, to be continued; the schedule is that of the whole stage"""
    global_batch: int | None = None
    """samples per optimizer step, over all devices"""
    learning_rate: float | None = None
    """peak learning rate"""
    head_rate_ratio: float | None = None
    """learning rate of the coordinate heads, as a share of the peak learning rate"""
    warmup_ratio: float | None = None
    """share of the steps in which the learning rate rises"""
    weight_decay: float | None = None
    """AdamW's decoupled weight decay"""
    max_grad_norm: float | None = None
    """gradient clipping; 0 for none"""
    lora_rank: int | None = None
    """rank of the LoRA on q, k, v, o, gate, up and down"""
    lora_alpha: float | None = None
    """LoRA's alpha; its scale is alpha / rank"""
    label_smoothing: float | None = None
    """label smoothing of the cross-entropy"""
    trajectory_weight: float | None = None
    """lambda, the weight of the L1"""
    absent: Absent = "skip"
    """coordinates at (-1, -1) carry no loss, or are regressed to -1 as the paper's text says"""
    trajectory_normalizer: Normalizer = "present"
    """divide the L1 by present coordinates, or by P * N per supervised token (paper eq. 8)"""
    head_init: bool = True
    """start the trajectory head from stage 1's localization head (eq. 9)"""
    seed: int = 0
    """of the data order and of new weights"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the frozen weights and activations; auto is bfloat16 on CUDA and float32 elsewhere"""
    frozen_dtype: Literal["fp8"] | None = None
    """fp8 multiplies the layers' frozen weights in float8, forward and backward: sm_89 and newer (H100, H200), with
    bfloat16 elsewhere; a CPU emulates it. LoRA, heads and what is saved are unaffected"""
    device: Literal["cpu", "cuda"] | None = None
    """where to train; CUDA where there is one"""
    workers: int = 2
    """threads of each rank that prepare the next steps' batches; 0 prepares each when it is needed"""
    checkpoint_every: int = 100
    """optimizer steps between checkpoints"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay on disk"""
    parallel: Parallel = "auto"
    """copy the frozen weights to every device (ddp) or shard them (fsdp); auto shards where they do not fit"""
    recompute: int | None = None
    """layers that keep no activations and compute them again in backward; as few as memory allows unless given"""
    compile: bool = False
    """have torch.compile fuse the layers' elementwise work, in a minute at the start; `python -m bench.step` times both"""
    stall_timeout: float = 600.0
    """seconds in which every rank must reach the end of a step; one that does not is named and ends the run"""
    profile: tuple[int, int] | None = None
    """first and last step to profile, counted from 1: a trace, and on CUDA a memory history, in OUTPUT/stageN/profile"""
    wandb: str | None = None
    """project on Weights & Biases that gets the metrics too"""
    dry_run: bool = False
    """print parameters, tokens, steps, memory and hours, and train nothing"""

    def __post_init__(self) -> None:
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"--failure-budget is a share between 0 and 1, not {self.failure_budget}")
        if self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, not {self.workers}")
        for name in ("num_points", "max_length", "token_budget", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"--profile takes a first and a last step, counted from 1, not {self.profile}")
        if self.stall_timeout <= 0:
            raise ValueError(f"--stall-timeout must be positive, not {self.stall_timeout}")
        if self.stage == "2" and not self.trajectory_stage:
            raise ValueError("--stage 2 is the trajectory stage: leave --no-trajectory-stage out")
        if self.model == "tiny" and self.llm is None:
            raise ValueError("--model tiny needs --llm, the directory that `python -m engine.tiny` made")

    @property
    def stages(self) -> tuple[Stage, ...]:
        if self.stage == "all":
            return (1, 2, 3) if self.trajectory_stage else (1, 3)
        return (cast(Stage, int(self.stage)),)

    def start(self, stage: Stage) -> Path | None:
        """The stage's output that `stage` starts from; None for the language model."""
        if self.init is not None or stage == 1 or self.llm == RANDOM:
            return self.init
        before = stage - 1 if self.trajectory_stage else 1
        return self.output / f"stage{before}" / "final"

    def recipe(self, stage: Stage) -> Recipe:
        """The stage's recipe with this run's flags over it."""
        own = {f.name for f in fields(Recipe)}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in own}
        return replace(recipe(self.model, stage), **{k: v for k, v in given.items() if v is not None})

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        name = self.dtype if self.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
        return cast(torch.dtype, getattr(torch, name))


def main(argv: list[str] | None = None) -> int:
    config = parse(TrainConfig, argv, prog="python -m engine.train")
    if config.dry_run:
        return budget.main(argv)
    world: World | None = None
    status = 1
    alone_because: str | None = "an error, which its own output tells"
    try:
        if config.wandb is not None:
            require_wandb()
        world = World.join(config.device, config.stall_timeout)
        for stage in config.stages:
            if not train_stage(config, stage, world):
                break
        status, alone_because = 0, None
    except NonFiniteError as error:
        # All ranks know it; one says it, and all leave together.
        if world is None or world.is_main:
            print(f"engine.train: {error}", file=sys.stderr)
        alone_because = None
    except torch.OutOfMemoryError as error:
        print(f"engine.train: {error}\nLower --token-budget, which is one micro-batch's tokens.", file=sys.stderr)
        alone_because = "out of memory"
    except (ValueError, OSError) as error:
        print(f"engine.train: {error}", file=sys.stderr)
        alone_because = str(error)
    except RuntimeError:
        # A collective that failed says nothing of its cause; the watch may know it.
        cause = world.watch.explain() if world is not None and world.watch is not None else None
        if world is None or cause is None:
            raise
        say_end(f"rank {world.rank} ends: {cause}")
        alone_because = f"lost {cause}"
    finally:
        if world is not None:
            world.leave(alone_because)
    return status


def train_stage(config: TrainConfig, stage: Stage, world: World) -> bool:
    """Train one stage to its end; False when it stopped before and can be continued."""
    directory = config.output / f"stage{stage}"
    final = directory / "final"
    recipe = config.recipe(stage)
    llm_name = config.llm or LANGUAGE_MODELS[config.model]
    llm = None if llm_name == RANDOM else checkpoint.resolve(llm_name)
    pite_config = _model_config(config, llm)
    dtype = config.torch_dtype(world.device)
    fp8 = config.frozen_dtype == "fp8"
    if fp8:
        check_fp8(world, dtype)
    same_as_before = {
        "language model": f"random {config.model}, seed {config.seed}"
        if llm is None
        else world.from_main(lambda: language_model_checksum(llm)),
        "frames and points": [pite_config.num_frames, pite_config.num_points],
    }
    start = config.start(stage)
    merged = merged_stages(stage, start, same_as_before)
    settings = {
        **same_as_before,
        "features": asdict(Manifest.load(config.store / ("images" if stage == 1 else "videos"))),
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
        made_of = checkpoint.read_lineage(final)["made_of"]
        data = {"data": None, "left out": None}
        state.compare({**made_of, **data}, {**settings, **data}, final)
        say(world, f"stage {stage} is done: {final}")
        return True

    tokenizer = load_tokenizer(llm or RANDOM)
    store = FeatureStore(config.store / ("images" if stage == 1 else "videos"))
    # The first rank that comes tokenizes, the others wait for it without a collective, which would time out.
    dataset = StageDataset(
        config.data,
        stage,
        tokenizer,
        num_frames=pite_config.num_frames if stage > 1 else 1,
        num_points=pite_config.num_points if stage > 1 else 1,
        max_length=config.max_length,
        available=store,
        cache=config.store / "samples",
        failure_budget=config.failure_budget,
        turn=config.turn,
        narrative_timing=config.narrative_timing,
    )
    left_out = directory / "left_out.jsonl"
    note = f"; they are listed in {left_out}" if dataset.exclusions() else ""
    say(world, f"stage {stage}: {dataset.summary()}{note}")
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        dataset.write_left_out(left_out)
    check_encoded(dataset, config.store)
    layout = choose_layout(
        pite_config,
        count_parameters(pite_config, recipe),
        budget.device_capacity(world.device),
        ranks=world.size,
        width=dtype.itemsize,
        fp8=fp8,
        parallel=config.parallel,
        recompute=config.recompute,
        token_budget=config.token_budget,
        longest=int(dataset.tokens.max()),
    )
    say(world, f"stage {stage}: {layout.describe(pite_config.llm.num_hidden_layers)}")
    if dataset.tokens.max() > layout.token_budget:
        raise ValueError(
            f"the longest sample has {dataset.tokens.max():,} tokens and a micro-batch holds {layout.token_budget:,}: "
            "lower --max-length or raise --token-budget"
        )
    plan = BatchPlan(len(dataset), recipe.global_batch, config.seed, dataset.groups() if recipe.group_media else None)
    if plan.left_over:
        say(
            world,
            f"stage {stage}: {plan.left_over} samples fill no batch of {recipe.global_batch}, others in each epoch",
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
    model = build_model(
        stage, recipe, pite_config, llm=llm, start=start, dataset=dataset, store=store, seed=config.seed,
        head_init=config.head_init, dtype=dtype, fp8=fp8, world=world, layout=layout,
    )  # fmt: skip
    if config.compile:
        model.decoder.compile_layers()
    total = plan.steps_per_epoch * recipe.epochs
    fingerprint = {**settings, "data": dataset.fingerprint(), "left out": dataset.exclusions() or None}
    done = run(config, recipe, model, source, world, directory, total, fingerprint)
    if done < total:
        say(world, f"stage {stage} stopped after step {done} of {total}; the same command continues")
        return False
    if world.is_main:
        plot_losses({directory.name: directory / "metrics.jsonl"}, directory / "losses.png")
    if llm is None:
        say(world, f"stage {stage} is done: random weights are not exported")
        return True
    if world.is_main:
        base = str(llm) if Path(llm_name).expanduser().is_dir() else llm_name
        lineage = {"stage": stage, "language_model": base, "merged": merged, "steps": done, "made_of": fingerprint}
        with directory_written_atomically(final) as beside:
            tokenizer.save_pretrained(str(beside))
            checkpoint.save_stage(model, beside, lineage)
    say(world, f"stage {stage} is done: {final}")
    world.barrier()
    return True


def _model_config(config: TrainConfig, llm: Path | None) -> PiTeConfig:
    if llm is not None:
        return model_config(llm, config.store, config.num_points)
    manifest = Manifest.load(config.store / "videos")
    return random_shape(config.model, config.num_points, manifest.tokens, manifest.channels)


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr)


def check_fp8(world: World, dtype: torch.dtype) -> None:
    """Raise ValueError where --frozen-dtype fp8 cannot be had."""
    why = why_unsupported(world.device)
    if why is not None:
        raise ValueError(f"--frozen-dtype fp8: {why}; leave the flag out")
    if world.device.type == "cuda" and dtype != torch.bfloat16:
        raise ValueError("--frozen-dtype fp8 on CUDA goes with bfloat16: leave --dtype out")
    if world.device.type == "cpu":
        say(world, "fp8 is emulated on a CPU: its rounding, not its speed")


def check_encoded(dataset: StageDataset, store: Path) -> None:
    """Raise ValueError when media are missing from the store though their encoding did not fail."""
    failed = {failure.id for failure in read_failures(store / LEDGER)}
    forgotten = sorted(set(dataset.not_encoded) - failed)
    if forgotten:
        raise ValueError(
            f"{len(forgotten):,} media, {forgotten[0]!r} among them, are neither in the feature store {store} nor in its "
            "ledger of failures; run engine.encode first"
        )


_RECIPE_FIELDS = tuple(f.name for f in fields(Recipe) if f.name not in ("learns", "head"))


if __name__ == "__main__":
    status = main()
    if status:
        # A collective that will never finish would keep the interpreter from ending.
        sys.stderr.flush()
        os._exit(status)
