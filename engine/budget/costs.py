"""The costs of a run in numbers: parameters, tokens, FLOPs, and for each kind of device memory and hours.

LoRA on frozen weights takes 2N FLOPs per computed row forward and 2N for the gradient of the activations, and none for a
gradient of the frozen weights. There is no padding, and what the samples of a micro-batch share is computed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPVisionConfig

from dataloaders.formats import split_of
from dataloaders.samples.dataset import StageDataset
from dataloaders.samples.plan import BatchPlan
from dataloaders.store.features import MANIFEST, FeatureStore
from engine.build import load_tokenizer, model_config, random_shape
from engine.config import TrainConfig
from engine.hardware import ASSUMED_FP8_GAIN, ASSUMED_MFU, DEVICES, measured_mfu
from engine.layout import MAX_TOKEN_BUDGET, Layout, Memory, ParameterCount, choose_layout, count_parameters, memory
from engine.prepare import check_tokens, dtype_of, open_dataset, split_held_out
from engine.recipes import LANGUAGE_MODELS, RANDOM, Recipe, Stage
from engine.sharing import PROMPT_HEAD, Lengths, Sharing, assume_sharing, count_sharing, lengths_of
from pite.config import PRESETS, PiTeConfig
from pite.towers import frame_flops, patch_flops
from pite_kernels.attention import choose_backend

VIT_L_14, VIT_L_14_336 = (
    CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=side,
    )
    for side in (224, 336)
)


@dataclass(frozen=True)
class Corpus:
    """A stage's training set: samples, means per sample, number of media, the lengths of its first global batches and of its
    longest sample, 0 where the data are assumed. `video` is the rows of a video that its questions share, where they are known
    without the data."""

    samples: int
    tokens: float
    targets: float
    media: int
    origin: str
    batches: tuple[Lengths, ...] = ()
    longest: int = 0
    video: int = 0

    def sharing(self, recipe: Recipe, ranks: int, token_budget: int) -> Sharing:
        """What the samples of the micro-batches share. Raises ValueError if a sample exceeds the budget."""
        if self.batches:
            return count_sharing(self.batches, ranks, token_budget)
        # One micro-batch a rank, or as many samples as fit.
        samples = min(recipe.global_batch / ranks, token_budget / self.tokens)
        found = assume_sharing(self.tokens, self.targets, samples)
        if not (self.video and recipe.group_media):
            return found
        # The questions about a video follow each other, and a global batch is cut from them. The plan keeps those of one video
        # in one micro-batch where each has a video.
        videos = 1 + (recipe.global_batch - 1) * self.media / self.samples
        for _ in range(2):  # more samples fit, since the rows of their videos count once
            samples = min(recipe.global_batch / ranks, token_budget / (self.tokens * found.computed))
            each = max(1.0, videos * samples / recipe.global_batch)
            found = assume_sharing(self.tokens, self.targets, samples, self.video, each)
        return found


_UNKNOWN = "samples over length not known"
ASSUMED_CORPORA: dict[Stage, Corpus] = {
    1: Corpus(692_458, 115, 55, 692_458, f"assumed: Localized Narratives' four training sets; {_UNKNOWN}"),
    2: Corpus(143_640, 215, 65, 143_640, f"assumed: PiTe-143k, 2.4 events and 7.1 mentions per video; {_UNKNOWN}"),
    3: Corpus(173_000, 260, 90, 86_303, f"assumed: Valley 73k and VideoInstruct100K, 90 answer tokens; {_UNKNOWN}"),
}
"""Assumed training sets, from the counts in their papers, for stages whose data are not on disk."""

ASSUMED_INSTRUCT = Corpus(
    100_010, 850, 100, 13_303, f"assumed: VideoInstruct100K, 678 rows of a video, 100 answer tokens; {_UNKNOWN}"
)
"""PG-Video-LLaVA's training set. Its 13,303 videos are those in the published list."""


@dataclass(frozen=True)
class MachineCost:
    """A stage on `ranks` devices of a kind.

    layout    None where the stage does not fit; `refusal` is the reason
    needed    estimated memory of a device
    hours     None where the speed is not known
    rate      share of the device's peak that the hours assume; `measured` if bench/results holds it
    sharing   what its micro-batches share
    filled    share of the micro-batches' token budget that is used; None without data
    """

    device: str
    ranks: int
    layout: Layout | None = None
    refusal: str = ""
    needed: Memory | None = None
    hours: float | None = None
    rate: float = 0.0
    measured: bool = False
    sharing: Sharing | None = None
    filled: float | None = None


@dataclass(frozen=True)
class StageCost:
    """A stage in numbers: `flops` of its training, and `encoding` those of CLIP for its media.

    size          "7b", "13b" or "tiny"; for a language model of another shape its architecture
    rows          computed rows, on eight devices; `tokens` are those of the samples
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
    rows: float
    flops: float
    encoding: float
    attention: str
    machines: tuple[MachineCost, ...]


def run_costs(config: TrainConfig) -> list[StageCost]:
    """The costs of each stage of a run. Raises ValueError as `engine.prepare` does, for data that are on disk."""
    return [stage_cost(config, stage) for stage in config.stages]


def stage_cost(config: TrainConfig, stage: Stage) -> StageCost:
    recipe = config.recipe(stage)
    model, shape = _shape(config)
    size = _size(config, model)
    corpus = _corpus(config, stage, model)
    count = count_parameters(model, recipe)
    steps = corpus.samples // recipe.global_batch * recipe.epochs
    if not steps:
        raise ValueError(
            f"stage {stage}: {corpus.samples} samples do not fill one global batch of {recipe.global_batch}: "
            "lower --global-batch"
        )
    samples = steps * recipe.global_batch
    tokens = samples * corpus.tokens
    sharing = corpus.sharing(recipe, 8, max(MAX_TOKEN_BUDGET, corpus.longest))
    machines = (
        _machine_cost(config, recipe, name, ranks, model, count, corpus, samples, size)
        for name in DEVICES
        for ranks in config.run.devices
    )
    frames = 1 if stage == 1 else model.num_frames
    prefix = PROMPT_HEAD + (model.num_features + 2 if model.choices.marks and recipe.group_media else 0)
    return StageCost(
        stage=stage,
        size=size,
        model=model,
        shape=shape,
        recipe=recipe,
        parameters=count,
        corpus=corpus,
        steps=steps,
        tokens=tokens,
        rows=tokens * sharing.computed,
        flops=step_flops(
            model, count, tokens, tokens * sharing.computed, samples * corpus.targets, corpus.tokens, prefix
        ),
        encoding=corpus.media * frames * _frame_flops(model),
        attention=_attention(config, model),
        machines=tuple(machines),
    )


def step_flops(
    config: PiTeConfig,
    count: ParameterCount,
    tokens: float,
    rows: float,
    targets: float,
    mean_length: float,
    prefix: int = PROMPT_HEAD,
) -> float:
    """FLOPs of training: 4N per computed row, causal attention, vocabulary head.

    mean_length  tokens of a sample
    prefix       rows that samples share. A row that is not computed would have attended to half of them on average
    """
    llm = config.llm
    width = 6 * llm.num_attention_heads * config.head_dim * llm.num_hidden_layers
    attention = width * max(0.0, tokens * mean_length - (tokens - rows) * prefix)
    return count.flops(rows, targets) + attention + targets * 4 * llm.vocab_size * llm.hidden_size


def _frame_flops(model: PiTeConfig) -> float:
    """FLOPs of the family's CLIP for a frame."""
    return patch_flops(VIT_L_14_336) if model.choices.marks else frame_flops(VIT_L_14, model.vision_feature_size)


def _machine_cost(
    config: TrainConfig,
    recipe: Recipe,
    name: str,
    ranks: int,
    model: PiTeConfig,
    count: ParameterCount,
    corpus: Corpus,
    samples: int,
    size: str,
) -> MachineCost:
    device, fp8 = DEVICES[name], config.model.frozen_dtype == "fp8"
    width = 4 if config.model.dtype == "float32" else 2
    if fp8 and not device.fp8:
        return MachineCost(name, ranks, refusal="has no float8 arithmetic")
    try:
        sharing = corpus.sharing(recipe, ranks, config.parallel.token_budget or max(MAX_TOKEN_BUDGET, corpus.longest))
        layout = choose_layout(
            model, count, device.bytes, ranks=ranks, per_host=min(ranks, 8), width=width, fp8=fp8, parallel=config.parallel.parallel,
            recompute=config.parallel.recompute, token_budget=config.parallel.token_budget, longest=corpus.longest,
            read=sharing.read, copied=sharing.copied,
        )  # fmt: skip
        sharing = corpus.sharing(recipe, ranks, layout.token_budget)
    except ValueError as error:
        return MachineCost(name, ranks, refusal=f"does not fit: {error}")
    # A rank's share of a global batch may have fewer rows than its memory can hold.
    share = math.ceil(math.ceil(recipe.global_batch / ranks) * corpus.tokens * sharing.computed)
    needed = memory(
        model, count, min(layout.token_budget, max(share, corpus.longest)), width, fp8=fp8, recompute=layout.recompute,
        shards=layout.shards, read=sharing.read, copied=sharing.copied,
    )  # fmt: skip
    cost = MachineCost(
        name, ranks, layout, needed=needed, sharing=sharing, filled=sharing.filled if corpus.batches else None
    )
    if width != 2:
        return cost
    ours = "pite fp8" if fp8 else "pite compiled" if config.parallel.compile else "pite"
    measured = measured_mfu(size, name, config.run.measured, ours)
    rate = measured or ASSUMED_MFU * (ASSUMED_FP8_GAIN if fp8 else 1)
    flops = count.flops(samples * corpus.tokens * sharing.computed, samples * corpus.targets)
    flops *= 1 + layout.extra_flops(model.llm.num_hidden_layers)
    return replace(cost, hours=flops / (ranks * device.peak * rate) / 3600, rate=rate, measured=measured is not None)


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
        return random_shape(size, points, **_assumed_features(config)), "random weights"
    if llm is None:
        shape = random_shape(size, points, **_assumed_features(config))
        return shape, f"shape of {LANGUAGE_MODELS[config.model.family][size]}"
    directory = Path(llm).expanduser()
    if not directory.is_dir():
        cached = try_to_load_from_cache(llm, "config.json") if llm.count("/") == 1 else None
        if not isinstance(cached, str):
            raise ValueError(
                f"{llm} is neither a directory nor in the Hugging Face cache, and a dry run downloads nothing"
            )
        directory = Path(cached).parent
    if config.video_features.is_dir():
        return model_config(directory, config), llm
    return PiTeConfig.load(directory, num_points=points, **_assumed_features(config)), llm


def _assumed_features(config: TrainConfig) -> dict[str, Any]:
    """The fields of `PiTeConfig` that the features give, without a store: those of the family's own CLIP."""
    if not config.choices.marks:
        return {}
    return {"family": config.choices.name, "vision_feature_size": VIT_L_14_336.hidden_size, "num_places": 24**2}


def _size(config: TrainConfig, model: PiTeConfig) -> str:
    """The size whose measured speed and published hours are those of this shape; else the architecture's name."""
    size, llm = config.model.size, model.llm
    vicuna = llm.num_key_value_heads == llm.num_attention_heads and llm.vocab_size in range(32_000, 32_100)
    if size == "tiny" or (vicuna and all(getattr(llm, name) == value for name, value in PRESETS[size].items())):
        return size
    return model.architecture.name


def _corpus(config: TrainConfig, stage: Stage, model: PiTeConfig) -> Corpus:
    """A stage's training set on disk, or the assumed one if it is not there."""
    assumed = ASSUMED_CORPORA[stage]
    if config.choices.marks:
        assumed = _assumed_instruct(config, model)
    if not (config.data.folder / split_of(stage)).is_dir():
        return assumed
    name = config.model.llm or LANGUAGE_MODELS[config.model.family][config.model.size]
    if name != RANDOM and not Path(name).expanduser().is_dir():
        cached = try_to_load_from_cache(name, "tokenizer_config.json")
        if not isinstance(cached, str):
            why = (
                f"{config.data.folder / split_of(stage)} is not counted: the tokenizer of {name} is not on this machine"
            )
            return replace(assumed, origin=f"{assumed.origin}; {why}")
        name = str(Path(cached).parent)
    tokenizer = load_tokenizer(name)
    # Tokenizing takes minutes: keep the result for the run that follows.
    cache = config.data.samples if config.data.cache or config.data.store.is_dir() else None
    data = open_dataset(config, stage, tokenizer, model, available=None, cache=cache)
    check_tokens(data, tokenizer, model)
    if config.held_out is not None:
        data, _ = split_held_out(data, config.held_out)
    recipe = config.recipe(stage)
    groups = data.groups if recipe.group_media else None
    plan = BatchPlan(len(data), recipe.global_batch, config.optimization.seed, groups)
    over = "" if data.over_length else f", none of more than {config.data.max_length:,} tokens"
    return Corpus(
        len(data),
        float(data.tokens.mean()),
        float(data.targets.mean()),
        len(set(data.media)),
        f"counted: {data.summary()}{over}{_not_encoded(config, stage, data)}",
        tuple(lengths_of(data, plan)),
        int(data.tokens.max()),
    )


def _assumed_instruct(config: TrainConfig, model: PiTeConfig) -> Corpus:
    """VideoInstruct100K, of whose videos with `--video-first always` the rows and the two marks are shared."""
    assumed = ASSUMED_INSTRUCT
    if config.data.transcripts is not None:
        assumed = replace(assumed, origin=f"{assumed.origin}; the tokens of --transcripts are not counted")
    if config.data.video_first != "always":
        return assumed
    questions = assumed.samples / assumed.media
    return replace(
        assumed,
        video=model.num_features + 2,
        origin=f"{assumed.origin}, {questions:.1f} questions about each video, which come after it",
    )


def _not_encoded(config: TrainConfig, stage: Stage, data: StageDataset) -> str:
    """A note on media without features, if the features of others are there."""
    path = config.data.features(stage)
    missing = set(data.media) - FeatureStore.stored_keys(path)
    if not missing or not (path / MANIFEST).exists():
        return ""
    media = f"{len(missing):,} of its media {'is' if len(missing) == 1 else 'are'}"
    return f", {media} not in {path}, such as {min(missing)}: run engine.encode"
