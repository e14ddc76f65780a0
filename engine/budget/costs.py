"""The costs of a run in numbers: parameters, tokens, FLOPs, and for each kind of device memory and hours.

LoRA on frozen weights takes 2N FLOPs per token forward and 2N for the gradient of the activations, and none for a
gradient of the frozen weights. There is no padding, so all tokens are useful ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPVisionConfig

from dataloaders.formats import split_of
from dataloaders.samples.dataset import StageDataset
from dataloaders.samples.plan import BatchPlan, split_batch
from dataloaders.store.features import MANIFEST, FeatureStore
from engine.build import load_tokenizer, model_config, random_shape
from engine.config import TrainConfig
from engine.hardware import ASSUMED_FP8_GAIN, ASSUMED_MFU, DEVICES, measured_mfu
from engine.layout import Layout, Memory, ParameterCount, choose_layout, count_parameters, memory
from engine.prepare import check_tokens, dtype_of
from engine.recipes import LANGUAGE_MODELS, RANDOM, Recipe, Stage
from pite.clip import frame_flops
from pite.config import PiTeConfig
from pite_kernels.attention import choose_backend

COUNTED_STEPS = 100
"""Number of global batches whose micro-batches the dry run plans."""

VIT_L_14 = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
)


@dataclass(frozen=True)
class Corpus:
    """A stage's training set: samples, means per sample, number of media, the lengths of its first global batches."""

    samples: int
    tokens: float
    targets: float
    media: int
    origin: str
    batches: tuple[np.ndarray, ...] = ()


_UNKNOWN = "samples over length not known"
ASSUMED_CORPORA: dict[Stage, Corpus] = {
    1: Corpus(692_458, 115, 55, 692_458, f"assumed: Localized Narratives' four training sets; {_UNKNOWN}"),
    2: Corpus(143_640, 215, 65, 143_640, f"assumed: PiTe-143k, 2.4 events and 7.1 mentions per video; {_UNKNOWN}"),
    3: Corpus(173_000, 260, 90, 86_303, f"assumed: Valley 73k and VideoInstruct100K, 90 answer tokens; {_UNKNOWN}"),
}
"""Assumed training sets, from the counts in their papers, for stages whose data are not on disk."""


@dataclass(frozen=True)
class MachineCost:
    """A stage on `ranks` devices of a kind.

    layout    None where the stage does not fit; `refusal` is the reason
    needed    estimated memory of a device
    hours     None where the speed is not known
    rate      share of the device's peak that the hours assume; `measured` if bench/results holds it
    fullness  share of the micro-batches' token budget that is used; None without data
    """

    device: str
    ranks: int
    layout: Layout | None = None
    refusal: str = ""
    needed: Memory | None = None
    hours: float | None = None
    rate: float = 0.0
    measured: bool = False
    fullness: float | None = None


@dataclass(frozen=True)
class StageCost:
    """A stage in numbers: `flops` of its training, and `encoding` those of CLIP for its media.

    model, shape  its configuration, and where that is from
    attention     the attention back end of this machine
    """

    stage: Stage
    size: str
    model: PiTeConfig
    shape: str
    recipe: Recipe
    parameters: ParameterCount
    corpus: Corpus
    steps: int
    tokens: float
    flops: float
    encoding: float
    attention: str
    machines: tuple[MachineCost, ...]


def run_costs(config: TrainConfig) -> list[StageCost]:
    """The costs of each stage of a run. Raises ValueError as `engine.prepare` does, for data that are on disk."""
    return [stage_cost(config, stage) for stage in config.run.stages]


def stage_cost(config: TrainConfig, stage: Stage) -> StageCost:
    recipe = config.recipe(stage)
    model, shape = _shape(config)
    corpus = _corpus(config, stage, model)
    count = count_parameters(model, recipe)
    steps = corpus.samples // recipe.global_batch * recipe.epochs
    if not steps:
        raise ValueError(f"{corpus.samples} samples do not fill one global batch of {recipe.global_batch}")
    samples = steps * recipe.global_batch
    tokens = samples * corpus.tokens
    machines = (
        _machine_cost(config, recipe, name, ranks, model, count, corpus, 4 * count.linear * tokens)
        for name in DEVICES
        for ranks in config.run.devices
    )
    frames = 1 if stage == 1 else model.num_frames
    return StageCost(
        stage=stage,
        size=config.model.size,
        model=model,
        shape=shape,
        recipe=recipe,
        parameters=count,
        corpus=corpus,
        steps=steps,
        tokens=tokens,
        flops=step_flops(model, count.linear, tokens, samples * corpus.targets, corpus.tokens),
        encoding=corpus.media * frames * frame_flops(VIT_L_14, model.vision_feature_size),
        attention=_attention(config, model),
        machines=tuple(machines),
    )


def fullness(batches: Sequence[np.ndarray], ranks: int, token_budget: int) -> float:
    """Useful tokens of the global batches, divided by the token budget of all micro-batches that they are split into.

    Raises ValueError if a sample exceeds the budget.
    """
    planned = sum(len(of_rank) for batch in batches for of_rank in split_batch(batch, ranks, token_budget))
    return sum(int(batch.sum()) for batch in batches) / (planned * token_budget)


def step_flops(config: PiTeConfig, linear: int, tokens: float, targets: float, mean_length: float) -> float:
    """FLOPs of training on `tokens` packed tokens: 4N each, causal attention at the mean length, vocabulary head."""
    llm = config.llm
    width = llm.num_attention_heads * config.head_dim
    attention = 6 * width * mean_length * llm.num_hidden_layers
    return tokens * (4 * linear + attention) + targets * 4 * llm.vocab_size * llm.hidden_size


def _machine_cost(
    config: TrainConfig,
    recipe: Recipe,
    name: str,
    ranks: int,
    model: PiTeConfig,
    count: ParameterCount,
    corpus: Corpus,
    flops: float,
) -> MachineCost:
    device, fp8 = DEVICES[name], config.model.frozen_dtype == "fp8"
    width = 4 if config.model.dtype == "float32" else 2
    if fp8 and not device.fp8:
        return MachineCost(name, ranks, refusal="has no float8 arithmetic")
    longest = max((int(batch.max()) for batch in corpus.batches), default=0)
    try:
        layout = choose_layout(
            model, count, device.bytes, ranks=ranks, width=width, fp8=fp8, parallel=config.parallel.parallel,
            recompute=config.parallel.recompute, token_budget=config.parallel.token_budget, longest=longest,
        )  # fmt: skip
        full = fullness(corpus.batches, ranks, layout.token_budget) if corpus.batches else None
    except ValueError as error:
        return MachineCost(name, ranks, refusal=f"does not fit: {error}")
    # A rank's share of a global batch may have fewer tokens than its memory can hold.
    share = math.ceil(recipe.global_batch / ranks) * corpus.tokens
    planned = min(layout.token_budget, max(math.ceil(share), longest))
    needed = memory(model, count, planned, width, fp8=fp8, recompute=layout.recompute, shards=layout.shards)
    if width != 2:
        return MachineCost(name, ranks, layout, needed=needed, fullness=full)
    ours = "pite fp8" if fp8 else "pite compiled" if config.parallel.compile else "pite"
    measured = measured_mfu(config.model.size, name, config.run.measured, ours)
    rate = measured or ASSUMED_MFU * (ASSUMED_FP8_GAIN if fp8 else 1)
    flops *= 1 + layout.extra_flops(model.llm.num_hidden_layers)
    hours = flops / (ranks * device.peak * rate) / 3600
    return MachineCost(
        name, ranks, layout, needed=needed, hours=hours, rate=rate, measured=measured is not None, fullness=full
    )


def _attention(config: TrainConfig, model: PiTeConfig) -> str:
    """The attention back end on this machine."""
    here = torch.device("cuda:0" if config.parallel.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype, llm = dtype_of(config, here), model.llm
    name = choose_backend(here, dtype, llm.num_attention_heads, llm.num_key_value_heads, model.head_dim)
    device = torch.cuda.get_device_name(here) if here.type == "cuda" else "a CPU"
    return f"by {name} on this machine ({device}, {dtype})"


def _shape(config: TrainConfig) -> tuple[PiTeConfig, str]:
    """The model's shape and its origin: a language model on this machine, or without --llm the size's Vicuna."""
    llm, size, points = config.model.llm, config.model.size, config.model.num_points
    if llm == RANDOM:
        return random_shape(size, points), "random weights"
    if llm is None:
        shape = replace(PiTeConfig.preset(size), num_points=points)  # type: ignore[arg-type]
        return shape, f"shape of {LANGUAGE_MODELS[size]}"
    directory = Path(llm).expanduser()
    if not directory.is_dir():
        cached = try_to_load_from_cache(llm, "config.json") if llm.count("/") == 1 else None
        if not isinstance(cached, str):
            raise ValueError(
                f"{llm} is neither a directory nor in the Hugging Face cache, and a dry run downloads nothing"
            )
        directory = Path(cached).parent
    if config.data.features(2).is_dir():
        return model_config(directory, config.data.store, points), llm
    return PiTeConfig.load(directory, num_points=points), llm


def _corpus(config: TrainConfig, stage: Stage, model: PiTeConfig) -> Corpus:
    """A stage's training set on disk, or the assumed one if it is not there."""
    if not (config.data.folder / split_of(stage)).is_dir():
        return ASSUMED_CORPORA[stage]
    try:
        tokenizer = load_tokenizer(config.model.llm or LANGUAGE_MODELS[config.model.size])
    except OSError:
        return ASSUMED_CORPORA[stage]
    frames, points = (1, 1) if stage == 1 else (model.num_frames, model.num_points)
    data = StageDataset(
        config.data.folder,
        stage,
        tokenizer,
        num_frames=frames,
        num_points=points,
        max_length=config.data.max_length,
        available=None,
        # Tokenizing takes minutes: keep the result for the run that follows.
        cache=config.data.samples if config.data.cache or config.data.store.is_dir() else None,
        failure_budget=config.data.failure_budget,
        turn=config.data.turn,
        narrative_timing=config.data.narrative_timing,
    )
    check_tokens(data, tokenizer, model)
    recipe = config.recipe(stage)
    groups = data.groups() if recipe.group_media else None
    plan = BatchPlan(len(data), recipe.global_batch, config.optimization.seed, groups)
    over = "" if data.over_length else f", none of more than {config.data.max_length:,} tokens"
    return Corpus(
        len(data),
        float(data.tokens.mean()),
        float(data.targets.mean()),
        len(set(data.media)),
        f"counted: {data.summary()}{over}{_not_encoded(config, stage, data)}",
        tuple(data.tokens[plan.samples(step)] for step in range(min(COUNTED_STEPS, plan.steps_per_epoch))),
    )


def _not_encoded(config: TrainConfig, stage: Stage, data: StageDataset) -> str:
    """A note on media without features, if the features of others are there."""
    path = config.data.features(stage)
    missing = set(data.media) - FeatureStore.stored_keys(path)
    if not missing or not (path / MANIFEST).exists():
        return ""
    media = f"{len(missing):,} of its media {'is' if len(missing) == 1 else 'are'}"
    return f", {media} not in {path}, such as {min(missing)}: run engine.encode"
