"""python -m engine.train --stage 1|2|3|all --model tiny|7b|13b --data DIR --store DIR --output DIR

Each stage starts from the one before (its LoRA merged, a new one on top) and leaves OUTPUT/stageN/final. The same
command again continues where it was stopped, or says that it is done.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoTokenizer

from dataloaders.batch import PackedBatch
from dataloaders.dataset import StageDataset
from dataloaders.files import directory_written_atomically, sha256
from dataloaders.ledger import LEDGER, read_failures
from dataloaders.plan import BatchPlan
from dataloaders.prefetch import prefetch
from dataloaders.store import FeatureStore, Manifest
from engine import budget, state
from engine.build import build_model, language_model_checksum, merged_stages, model_config
from engine.config import parse
from engine.data import Absent, Normalizer, StepSource
from engine.loop import NonFiniteError, compute_losses, make_optimizer, train
from engine.metrics import Metrics
from engine.parallel import World
from engine.recipes import LANGUAGE_MODELS, Recipe, Size, Stage, recipe
from pite import checkpoint
from pite.model import PiTe


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
    model: Size = "7b"
    """size of the language model: Vicuna v1.5 7b or 13b, or the miniature of the demo"""
    llm: str | None = None
    """directory or Hugging Face name of the language model; the size's Vicuna v1.5 unless given"""
    init: Path | None = None
    """output of an earlier stage to start from, instead of OUTPUT's previous stage"""
    num_points: int = 3
    """P, key points per object"""
    max_length: int = 2048
    """tokens of the longest sample; longer ones are left out, counted and reported"""
    token_budget: int | None = None
    """most tokens of a micro-batch on one device; what its memory holds, up to 16384, unless given"""
    epochs: int | None = None
    """passes over the data"""
    max_steps: int | None = None
    """stop after this many optimizer steps of a stage, to be continued; the schedule is that of the whole stage"""
    global_batch: int | None = None
    """samples per optimizer step, over all devices"""
    learning_rate: float | None = None
    """peak learning rate"""
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
    device: Literal["cpu", "cuda"] | None = None
    """where to train; CUDA where there is one"""
    checkpoint_every: int = 100
    """optimizer steps between checkpoints"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay on disk"""
    dry_run: bool = False
    """print parameters, tokens, steps, memory and hours, and train nothing"""

    def __post_init__(self) -> None:
        for name in ("num_points", "max_length", "token_budget", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.model == "tiny" and self.llm is None:
            raise ValueError("--model tiny needs --llm, the directory that `python -m engine.tiny` made")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (1, 2, 3) if self.stage == "all" else (cast(Stage, int(self.stage)),)

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
    try:
        if config.dry_run:
            print(budget.report(config))
            return 0
        world = World.join(config.device)
        for stage in config.stages:
            if not train_stage(config, stage, world):
                break
    except torch.OutOfMemoryError as error:
        print(f"engine.train: {error}\nLower --token-budget, which is one micro-batch's tokens.", file=sys.stderr)
        return 1
    except (ValueError, OSError, NonFiniteError) as error:
        print(f"engine.train: {error}", file=sys.stderr)
        return 1
    world.leave()
    return 0


def train_stage(config: TrainConfig, stage: Stage, world: World) -> bool:
    """Train one stage to its end; False when it stopped before and can be continued."""
    directory = config.output / f"stage{stage}"
    final = directory / "final"
    recipe = config.recipe(stage)
    llm_name = config.llm or LANGUAGE_MODELS[config.model]
    llm = checkpoint.resolve(llm_name)
    pite_config = model_config(llm, config.store, config.num_points)
    dtype = config.torch_dtype(world.device)
    same_as_before = {
        "language model": world.from_main(lambda: language_model_checksum(llm)),
        "frames and points": [pite_config.num_frames, pite_config.num_points],
    }
    start = config.init or (None if stage == 1 else config.output / f"stage{stage - 1}" / "final")
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
        "dtype": str(dtype),
        **{name.replace("_", " "): getattr(recipe, name) for name in _RECIPE_FIELDS},
    }
    if (final / checkpoint.LINEAGE).exists():
        made_of = checkpoint.read_lineage(final)["made_of"]
        state.compare({**made_of, "data": None}, {**settings, "data": None}, final)
        say(world, f"stage {stage} is done: {final}")
        return True

    tokenizer = AutoTokenizer.from_pretrained(str(llm))
    store = FeatureStore(config.store / ("images" if stage == 1 else "videos"))
    dataset = world.from_main(
        lambda: StageDataset(
            config.data,
            stage,
            tokenizer,
            num_frames=pite_config.num_frames if stage > 1 else 1,
            num_points=pite_config.num_points if stage > 1 else 1,
            max_length=config.max_length,
            available=store,
        )
    )
    say(world, f"stage {stage}: {dataset.summary()}")
    check_encoded(dataset, config.store)
    token_budget = config.token_budget or budget.device_token_budget(pite_config, recipe, world.device, dtype)
    if dataset.tokens.max() > token_budget:
        raise ValueError(
            f"the longest sample has {dataset.tokens.max():,} tokens and a micro-batch holds {token_budget:,}: lower "
            "--max-length or raise --token-budget"
        )
    plan = BatchPlan(len(dataset), recipe.global_batch, config.seed, dataset.groups() if recipe.group_media else None)
    source = StepSource(
        dataset,
        plan,
        store,
        token_budget=token_budget,
        rank=world.rank,
        ranks=world.size,
        absent=config.absent,
        normalizer=config.trajectory_normalizer,
        pin_memory=world.device.type == "cuda",
    )
    model = build_model(
        stage, recipe, pite_config, llm=llm, start=start, store=store, seed=config.seed, head_init=config.head_init,
        dtype=dtype, device=str(world.device),
    )  # fmt: skip
    total = plan.steps_per_epoch * recipe.epochs
    fingerprint = {**settings, "data": dataset.fingerprint()}
    done = run(config, recipe, model, source, world, directory, total, fingerprint)
    if done < total:
        say(world, f"stage {stage} stopped after step {done} of {total}; the same command continues")
        return False
    if world.is_main:
        base = str(llm) if Path(llm_name).expanduser().is_dir() else llm_name
        lineage = {"stage": stage, "language_model": base, "merged": merged, "steps": done, "made_of": fingerprint}
        with directory_written_atomically(final) as beside:
            tokenizer.save_pretrained(str(beside))
            checkpoint.save_stage(model, beside, lineage)
    say(world, f"stage {stage} is done: {final}")
    world.barrier()
    return True


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr)


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


def run(
    config: TrainConfig,
    recipe: Recipe,
    model: PiTe,
    source: StepSource,
    world: World,
    directory: Path,
    total: int,
    fingerprint: dict[str, Any],
) -> int:
    """Resume, train and checkpoint one stage; returns the steps done."""
    parameters = dict(model.trainable())
    optimizer = make_optimizer(model, recipe)
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    newest, complaints = state.newest(checkpoints)
    start = 0
    if newest is not None:
        state.restore(newest, parameters, optimizer, fingerprint)
        start = newest.step
    stop = min(total, config.max_steps or total)
    with (
        InterruptFlag() as interrupted,
        Metrics(directory if world.is_main else None, start=start, total=stop, title=directory.name) as metrics,
    ):
        for text in complaints:
            metrics.say(text)
        if start:
            metrics.say(f"continuing after step {start} of {stop}")

        def after_step(done: int, finish: Callable[[], None], stopping: bool) -> bool:
            if stopping or done % config.checkpoint_every == 0 or done == stop:
                finish()
                if world.is_main:
                    save(done)
            return stopping or done == stop

        def save(done: int) -> None:
            try:
                state.save(checkpoints, done, parameters, optimizer, fingerprint, config.keep_checkpoints)
            except OSError as error:
                whole, _ = state.newest(checkpoints)
                kept = f"the last whole one is {whole.path}" if whole else "there is none yet"
                raise ValueError(
                    f"checkpoint of step {done} could not be written ({error.strerror}); {kept}"
                ) from error

        def blame(step: int) -> list[str]:
            return [
                batch.sample_ids[0] for batch in source.singles(step) if not finite(model, batch, recipe, config.absent)
            ]

        with collector_frozen():
            return train(
                model,
                optimizer,
                prefetch(source.steps(start, stop)),
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
                efficiency=budget.efficiency(model.config, recipe, world),
            )


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
    """Within its block SIGTERM (preemption) and a first Ctrl-C set the flag instead of ending the process."""

    def __init__(self) -> None:
        self.set = False

    def _raise(self, *_: object) -> None:
        if self.set:
            raise KeyboardInterrupt
        self.set = True

    def __enter__(self) -> InterruptFlag:
        self._before = {number: signal.signal(number, self._raise) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
