"""Open and check everything that a stage reads, before any stage trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dataloaders.failures import LEDGER, read_failures
from dataloaders.files import known_checksums, remember_checksums
from dataloaders.samples.dataset import StageDataset, read_names
from dataloaders.samples.plan import BatchPlan, InOrder
from dataloaders.store.features import FeatureStore
from engine.batches import StepSource
from engine.build import (
    language_model_checksum,
    load_tokenizer,
    merged_stages,
    model_config,
    random_shape,
    shape_of_features,
)
from engine.config import TrainConfig
from engine.distributed.world import World
from engine.hardware import capacity_of
from engine.identity import Identity, ModelIdentity, stage_checksums
from engine.layout import MAX_TOKEN_BUDGET, Layout, choose_layout, count_parameters
from engine.recipes import LANGUAGE_MODELS, RANDOM, Recipe, Stage
from engine.sharing import Lengths, count_sharing, lengths_of
from pite import checkpoint
from pite.config import PiTeConfig
from pite.tokenizers import check_vocabulary
from pite_kernels.attention import choose_backend
from pite_kernels.fp8 import why_unsupported

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """The language model of a run: its name as given, its directory (None for random weights), and its tokenizer."""

    name: str
    directory: Path | None
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class StageInputs:
    """What a stage trains on, opened and checked.

    dataset   the training samples; held_out the samples to validate on, or None
    layout    copied or sharded weights, activation checkpointing, rows of a micro-batch
    """

    stage: Stage
    recipe: Recipe
    llm: LanguageModel
    model: PiTeConfig
    dtype: torch.dtype
    store: FeatureStore
    dataset: StageDataset
    held_out: StageDataset | None
    plan: BatchPlan
    layout: Layout

    @property
    def total(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.plan.steps_per_epoch * self.recipe.epochs

    def source(self, world: World) -> StepSource:
        """The micro-batches of each step, for this rank."""
        return self._source(self.dataset, self.plan, world)

    def validation_source(self, world: World) -> StepSource | None:
        """The micro-batches of the held-out samples, for this rank."""
        if self.held_out is None:
            return None
        return self._source(self.held_out, InOrder(len(self.held_out), self.recipe.global_batch), world)

    def _source(self, dataset: StageDataset, plan: BatchPlan | InOrder, world: World) -> StepSource:
        return StepSource(
            dataset, plan, self.store, token_budget=self.layout.token_budget, rank=world.rank, ranks=world.size,
            absent=self.recipe.absent, normalizer=self.recipe.trajectory_normalizer,
            pin_memory=world.device.type == "cuda",
        )  # fmt: skip


def prepare_language_model(config: TrainConfig, world: World) -> LanguageModel:
    """Find the language model, downloading a Hugging Face name that is not cached, and load its tokenizer.

    Raises ValueError for a tensor that is missing or has another shape; no weight is read.
    """
    name = config.model.llm or LANGUAGE_MODELS[config.model.family][config.model.size]
    if name == RANDOM:
        return LanguageModel(name, None, load_tokenizer(RANDOM))
    # One rank of each host downloads it.
    world.agree(lambda: checkpoint.resolve(name) if world.is_host_main else None)
    directory = checkpoint.resolve(name)
    shape = model_config(directory, config)
    world.agree_with_main(lambda: checkpoint.WeightLoader(shape, directory, dtype=torch.float32))
    return LanguageModel(name, directory, load_tokenizer(directory))


def prepare(config: TrainConfig, stage: Stage, llm: LanguageModel, world: World) -> StageInputs:
    """Open a stage's data and features, check them, and choose the layout.

    Raises ValueError, on all ranks, with the thing and the remedy.
    """
    world.set_status(f"reading the data of stage {stage}")
    recipe, model = config.recipe(stage), _model_config(config, llm)
    dtype, fp8 = dtype_of(config, world.device), config.model.frozen_dtype == "fp8"
    if fp8:
        world.agree(lambda: check_fp8(world.device, dtype))
    store = FeatureStore(config.data.features(stage))
    opened = _open_dataset(config, stage, world, llm.tokenizer, model, store)
    log.info("stage %s: %s", stage, opened.summary())
    _check_samples(opened, recipe, llm, model, config.data.store)
    dataset, held_out = split_held_out(opened, config.held_out)
    if held_out is not None:
        log.info("stage %s: %s samples are held out for validation", stage, f"{len(held_out):,}")
    plan = BatchPlan(
        len(dataset), recipe.global_batch, config.optimization.seed, dataset.groups if recipe.group_media else None
    )
    if plan.left_over:
        log.info(
            "stage %s: dropping the last incomplete batch (%s of %s samples, different ones in each epoch)",
            stage, plan.left_over, f"{len(dataset):,}",
        )  # fmt: skip
    layout = _layout(config, stage, model, dtype, world, opened, lengths_of(dataset, plan))
    inputs = StageInputs(stage, recipe, llm, model, dtype, store, dataset, held_out, plan, layout)
    if config.run.profile is not None and config.run.profile[0] > inputs.total:
        raise ValueError(f"--profile starts at step {config.run.profile[0]}, and stage {stage} has {inputs.total}")
    return inputs


def identify(config: TrainConfig, inputs: StageInputs, world: World) -> tuple[Identity, list[str]]:
    """The identity of a stage's training, and the outputs of earlier stages that are merged, in order.

    Raises ValueError if the earlier stage is missing, or was trained with another language model or encoder.
    """
    llm, stage, dataset = inputs.llm, inputs.stage, inputs.dataset
    checksum = (
        f"random {config.model.size}, seed {config.optimization.seed}"
        if llm.directory is None
        else world.from_host_main(lambda: language_model_checksum(llm.directory))
    )
    model = ModelIdentity.of(inputs.model, checksum, inputs.store.manifest.encoder)
    merged = merged_stages(stage, config.start(stage), model)
    identity = Identity(
        model=model,
        earlier_stages=stage_checksums(merged),
        recipe=inputs.recipe,
        dtype=str(inputs.dtype).removeprefix("torch."),
        frozen_dtype=config.model.frozen_dtype,
        seed=config.optimization.seed,
        features=inputs.store.manifest.as_dict(),
        data=dataset.fingerprint(),
        feature_records=world.from_host_main(lambda: inputs.store.fingerprint(dataset.media)),
        left_out=dataset.exclusions() or None,
        held_out=None if inputs.held_out is None else inputs.held_out.fingerprint(),
    )
    return identity, merged


def dtype_of(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights and activations."""
    name = config.model.dtype
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if the device or dtype does not support --frozen-dtype fp8."""
    why = why_unsupported(device)
    if why is not None:
        raise ValueError(f"--frozen-dtype fp8: {why}; leave the flag out")
    if device.type == "cuda" and dtype != torch.bfloat16:
        raise ValueError("--frozen-dtype fp8 on CUDA needs bfloat16: leave --dtype out")
    if device.type == "cpu":
        log.info("a CPU emulates fp8: its rounding, not its speed")


def check_tokens(dataset: StageDataset, tokenizer: PreTrainedTokenizerBase, config: PiTeConfig) -> None:
    """Raise ValueError if a sample has a token without an embedding, or is longer than the model's context."""
    worst = int(dataset.largest_tokens.argmax())
    check_vocabulary(
        int(dataset.largest_tokens[worst]), tokenizer, config.llm.vocab_size, f"sample {dataset.ids[worst]!r}"
    )
    if why := config.beyond_context(int(dataset.tokens.max())):
        over = int((dataset.tokens > config.context_length).sum())
        raise ValueError(
            f"{_longest(dataset)}, and {why}: --max-length {config.context_length} leaves out {over:,} such samples"
        )


def _longest(samples: StageDataset) -> str:
    worst = int(samples.tokens.argmax())
    return f"the longest sample ({samples.ids[worst]!r}) has {samples.tokens[worst]:,} tokens"


def split_held_out(samples: StageDataset, held_out: float | Path | None) -> tuple[StageDataset, StageDataset | None]:
    """The samples to train on, and those to validate on, if there are any; a file may name none of this stage."""
    if held_out is None or (isinstance(held_out, Path) and not samples.named_in(held_out).any()):
        return samples, None
    return samples.split(held_out)


def check_held_out(file: Path, held_out: Sequence[StageDataset | None]) -> None:
    """Warn of lines of the file that are no sample of any stage. Raises ValueError if none is."""
    wanted = read_names(file)
    known = {name for samples in held_out if samples is not None for name in (*samples.ids, *samples.media)}
    unknown = sorted(wanted - known)
    if not wanted & known:
        raise ValueError(f"--held-out {file}: none of its {len(wanted):,} lines is the id or media key of a sample")
    if unknown:
        log.warning("--held-out %s: %s of its lines are no sample, such as %r", file, f"{len(unknown):,}", unknown[0])


def _check_samples(dataset: StageDataset, recipe: Recipe, llm: LanguageModel, model: PiTeConfig, store: Path) -> None:
    failed = {failure.id for failure in read_failures(store / LEDGER)}
    missing = sorted(set(dataset.not_encoded) - failed)
    if missing:
        raise ValueError(
            f"{len(missing):,} media, {missing[0]!r} among them, are neither in the feature store {store} nor in its "
            "ledger of failures; run engine.encode first (for imported features, dataloaders.store import --data)"
        )
    if recipe.head is not None and not dataset.coordinates.any():
        field = "traces" if recipe.head == "localization" else "trajectories"
        raise ValueError(
            f"none of the {len(dataset):,} samples has a present coordinate, and the {recipe.head} head learns from "
            f"nothing else ({dataset.summary()}): check the field {field!r} of the records (docs/data.md)"
        )
    check_tokens(dataset, llm.tokenizer, model)


def open_dataset(
    config: TrainConfig,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    model: PiTeConfig,
    *,
    available: FeatureStore | None,
    cache: Path | None,
) -> StageDataset:
    """All samples of a stage; `available` and `cache` as in `StageDataset`."""
    # One frame in stage 1, and no trajectories at all in a family without them.
    frames, points = (1, 1) if stage == 1 or config.choices.marks else (model.num_frames, model.num_points)
    return StageDataset(
        config.data.folder,
        stage,
        tokenizer,
        num_frames=frames,
        num_points=points,
        max_length=config.data.max_length,
        available=available,
        cache=cache,
        failure_budget=config.data.failure_budget,
        turn=config.data.turn,
        narrative_timing=config.data.narrative_timing,
        formats=config.choices.files,
        marks=model.marks(config.data.video_first),
        transcripts=config.data.transcripts,
    )


def _open_dataset(
    config: TrainConfig,
    stage: Stage,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    model: PiTeConfig,
    store: FeatureStore,
) -> StageDataset:
    """All samples of the stage. Rank 0 alone tokenizes them, since file locks do not work on every file system."""

    def open_it() -> None:
        opened.append(open_dataset(config, stage, tokenizer, model, available=store, cache=config.data.samples))

    opened: list[StageDataset] = []
    world.agree_with_main(open_it)
    # The other ranks find what rank 0 made in the cache, unless each machine has a cache of its own. One rank of each machine
    # checksums the annotations.
    world.agree(lambda: open_it() if world.is_host_main and not world.is_main else None)
    remember_checksums(world.from_host_main(known_checksums))
    world.agree(lambda: None if opened else open_it())
    return opened[0]


def _layout(
    config: TrainConfig,
    stage: Stage,
    model: PiTeConfig,
    dtype: torch.dtype,
    world: World,
    samples: StageDataset,
    batches: Sequence[Lengths],
) -> Layout:
    """Choose and log the layout and the attention back end. Raises ValueError if the longest sample does not fit."""
    llm, longest = model.llm, int(samples.tokens.max())
    sharing = count_sharing(batches, world.size, max(config.parallel.token_budget or MAX_TOKEN_BUDGET, longest))
    layout = choose_layout(
        model,
        count_parameters(model, config.recipe(stage)),
        # All ranks have one layout: that of the smallest device.
        min(world.gather(capacity_of(world.device)), key=lambda capacity: capacity or 0.0),
        ranks=world.size,
        per_host=world.ranks_per_host(),
        width=dtype.itemsize,
        fp8=config.model.frozen_dtype == "fp8",
        parallel=config.parallel.parallel,
        recompute=config.parallel.recompute,
        token_budget=config.parallel.token_budget,
        longest=longest,
        read=sharing.read,
        copied=sharing.copied,
    )
    attention = choose_backend(world.device, dtype, llm.num_attention_heads, llm.num_key_value_heads, model.head_dim)
    log.info("stage %s: %s, attention by %s", stage, layout.describe(llm.num_hidden_layers), attention)
    if longest > layout.token_budget:
        raise ValueError(
            f"{_longest(samples)} and a micro-batch holds {layout.token_budget:,} rows: "
            "lower --max-length or raise --token-budget"
        )
    computed = count_sharing(batches, world.size, layout.token_budget).computed
    log.info("stage %s: %.0f%% of the samples' tokens are computed, the others are shared", stage, 100 * computed)
    return layout


def _model_config(config: TrainConfig, llm: LanguageModel) -> PiTeConfig:
    if llm.directory is not None:
        return model_config(llm.directory, config)
    return random_shape(config.model.size, config.model.num_points, **shape_of_features(config))
