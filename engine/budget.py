"""Estimate the cost of a run before it starts: `python -m engine.budget` takes the flags of engine.train.

It prints parameters, tokens, FLOPs, memory per device and hours. LoRA on frozen weights takes 2N FLOPs per token
forward and 2N for the gradient of the activations, and none for a gradient of the frozen weights. There is no padding,
so all tokens are useful ones.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPVisionConfig

from dataloaders.formats import split_of
from dataloaders.ranks import Ranks
from dataloaders.samples.plan import BatchPlan, split_batch
from dataloaders.cli import parse
from engine.config import TrainConfig
from engine.hardware import ASSUMED_FP8_GAIN, ASSUMED_MFU, CLIP_MFU, DEVICES, measured_mfu
from engine.layout import Memory, ParameterCount, choose_layout, count_parameters, memory
from engine.recipes import LANGUAGE_MODELS, Recipe, Stage
from pite.clip import frame_flops
from pite.config import PiTeConfig
from pite_kernels.attention import choose_backend

PAPER_HOURS = {"7b": 10.0, "13b": 17.0}
"""The paper's training time of all three stages on eight A100s."""

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


@dataclass(frozen=True)
class _Cost:
    """A stage's FLOPs, those of encoding its media, its hours by (device, count) where it fits, the printed lines."""

    flops: float
    encoding: float
    hours: dict[tuple[str, int], float]
    lines: list[str]


def report(config: TrainConfig) -> str:
    """The dry run's text: every stage of the run, and the sum of the hours next to the paper's."""
    costs = [_stage_cost(config, stage) for stage in config.stages]
    lines = [line for cost in costs for line in cost.lines]
    if len(costs) == 1:
        return "\n".join(lines)
    lines.append(f"stages {', '.join(map(str, config.stages))} together")
    for name, count in _machines(config):
        key = (name, count)
        if all(key in cost.hours for cost in costs):
            lines.append(f"  {f'{count}x {name}':<22}{sum(cost.hours[key] for cost in costs):7.2f} h")
    eight = 8 * DEVICES["A100-80GB"].peak * 3600
    floor, encoding = (sum(getattr(cost, part) for cost in costs) / eight for part in ("flops", "encoding"))
    # Stage 3 may use the videos of stage 2; then this counts them twice.
    lines.append(
        f"  features        {encoding / CLIP_MFU:.2f} h of 8x A100 for CLIP, once for all models and runs,"
        f" at {CLIP_MFU:.0%} of the bfloat16 peak (assumed, not measured)"
    )
    lines.append(
        f"  floor           {floor:.2f} h on 8x A100 at 100% of the peak, {floor + encoding:.2f} h with the features"
        + (f"; the paper took about {hours:.0f} h" if (hours := PAPER_HOURS.get(config.model)) else "")
    )
    return "\n".join(lines)


def _machines(config: TrainConfig) -> list[tuple[str, int]]:
    return [(name, count) for name in DEVICES for count in config.devices]


def _stage_cost(config: TrainConfig, stage: Stage) -> _Cost:
    recipe = config.recipe(stage)
    pite_config, shape_origin = _shape(config)
    corpus = _corpus(config, stage, pite_config)
    count = count_parameters(pite_config, recipe)
    steps = corpus.samples // recipe.global_batch * recipe.epochs
    if not steps:
        raise ValueError(f"{corpus.samples} samples do not fill one global batch of {recipe.global_batch}")
    samples = steps * recipe.global_batch
    tokens = samples * corpus.tokens
    flops = step_flops(pite_config, count.linear, tokens, samples * corpus.targets, corpus.tokens)
    lines = [
        f"stage {stage}, {config.model} ({shape_origin})",
        f"  parameters      {count.total / 1e6:,.1f} M, of which trained: LoRA {count.lora / 1e6:,.1f} M"
        f" + adapter and heads {count.heads / 1e6:,.1f} M",
        f"  data            {corpus.samples:,} samples, {corpus.tokens:,.0f} tokens and {corpus.targets:,.0f} targets"
        f" each ({corpus.origin})",
        f"  steps           {steps:,} of {recipe.global_batch} samples, {recipe.epochs} epochs,"
        f" {tokens / 1e6:,.1f} M tokens, no padding",
        f"  arithmetic      {flops:.2e} FLOPs (4N per token, attention, vocabulary head)",
        f"  attention       {_attention(config, pite_config)}",
        f"  {'GB of a device:':<25} hours   of peak   needed of   {'   '.join(_PARTS)}",
    ]
    hours: dict[tuple[str, int], float] = {}
    for name, ranks in _machines(config):
        line, taken = _device_line(config, name, ranks, pite_config, count, corpus, recipe, 4 * count.linear * tokens)
        lines.append(f"  {f'{ranks}x {name}':<22}{line}")
        if taken is not None:
            hours[name, ranks] = taken
    frames = 1 if stage == 1 else pite_config.num_frames
    encoding = corpus.media * frames * frame_flops(VIT_L_14, pite_config.vision_feature_size)
    if hours and any("%*" in line for line in lines):
        lines.append("  * assumed, not measured: bench/results holds no such step")
    return _Cost(flops, encoding, hours, lines)


def _device_line(
    config: TrainConfig,
    name: str,
    ranks: int,
    pite_config: PiTeConfig,
    count: ParameterCount,
    corpus: Corpus,
    recipe: Recipe,
    flops: float,
) -> tuple[str, float | None]:
    """The printed line for a stage on `ranks` devices of a kind, and its hours if it fits and its speed is known."""
    device, layers, fp8 = DEVICES[name], pite_config.llm.num_hidden_layers, config.frozen_dtype == "fp8"
    width = 4 if config.dtype == "float32" else 2
    if fp8 and not device.fp8:
        return "has no float8 arithmetic", None
    longest = max((int(batch.max()) for batch in corpus.batches), default=0)
    try:
        layout = choose_layout(
            pite_config, count, device.bytes, ranks=ranks, width=width, fp8=fp8, parallel=config.parallel,
            recompute=config.recompute, token_budget=config.token_budget, longest=longest,
        )  # fmt: skip
        full = f", {fullness(corpus.batches, ranks, layout.token_budget):.0%} full" if corpus.batches else ""
    except ValueError as error:
        return f"does not fit: {error}", None
    # A rank's share of a global batch may have fewer tokens than its memory can hold.
    share = math.ceil(recipe.global_batch / ranks) * corpus.tokens
    planned = min(layout.token_budget, max(math.ceil(share), longest))
    needed = memory(pite_config, count, planned, width, fp8=fp8, recompute=layout.recompute, shards=layout.shards)
    hours, text = None, "      -       -  "
    if width == 2:
        ours = "pite fp8" if fp8 else "pite compiled" if config.compile else "pite"
        measured = measured_mfu(config.model, name, config.measured, ours)
        rate = measured or ASSUMED_MFU * (ASSUMED_FP8_GAIN if fp8 else 1)
        hours = flops * (1 + layout.extra_flops(layers)) / (ranks * device.peak * rate) / 3600
        text = f"{hours:7.2f}{rate:9.0%}{' ' if measured else '*'}"
    return (
        f"{text}{needed.total / 1e9:10.0f} of {device.bytes / 1e9:3.0f}{_parts(needed)}"
        f"   {layout.describe(layers)}{full}",
        hours,
    )


_PARTS = ("weights", "LoRA, heads", "gradients", "AdamW", "activations", "losses")


def _parts(needed: Memory) -> str:
    """The columns of `_PARTS`: frozen weights; trainable parameters, gradients, two moments; activations; losses."""
    trained = needed.trained / 4
    values = (needed.weights, trained, trained, 2 * trained, needed.activations, needed.losses)
    return "".join(f"{value / 1e9:{len(name) + 3}.1f}" for name, value in zip(_PARTS, values))


def _attention(config: TrainConfig, pite_config: PiTeConfig) -> str:
    """The attention backend on this machine."""
    here = torch.device("cuda:0" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype, llm = config.torch_dtype(here), pite_config.llm
    name = choose_backend(here, dtype, llm.num_attention_heads, llm.num_key_value_heads, pite_config.head_dim)
    device = torch.cuda.get_device_name(here) if here.type == "cuda" else "a CPU"
    return f"by {name} on this machine ({device}, {dtype})"


def _shape(config: TrainConfig) -> tuple[PiTeConfig, str]:
    """The model's shape and its origin: a language model on this machine, or without --llm the size's Vicuna."""
    from engine.build import RANDOM, model_config, random_shape

    if config.llm == RANDOM:
        return random_shape(config.model, config.num_points), "random weights"
    if config.llm is None:
        shape = replace(PiTeConfig.preset(config.model), num_points=config.num_points)  # type: ignore[arg-type]
        return shape, f"shape of {LANGUAGE_MODELS[config.model]}"
    llm = Path(config.llm).expanduser()
    if not llm.is_dir():
        cached = try_to_load_from_cache(config.llm, "config.json") if config.llm.count("/") == 1 else None
        if not isinstance(cached, str):
            raise ValueError(
                f"{config.llm} is neither a directory nor in the Hugging Face cache, and a dry run downloads nothing"
            )
        llm = Path(cached).parent
    if (config.store / "videos").is_dir():
        return model_config(llm, config.store, config.num_points), str(config.llm)
    return PiTeConfig.load(llm, num_points=config.num_points), str(config.llm)


def _corpus(config: TrainConfig, stage: Stage, pite_config: PiTeConfig) -> Corpus:
    """A stage's training set on disk, or the assumed one if it is not there."""
    from dataloaders.samples.dataset import StageDataset
    from engine.build import load_tokenizer
    from engine.preflight import check_tokens

    if not config.data.is_dir() and config.data != TrainConfig.data:
        raise ValueError(f"{config.data}: no such data folder")
    if not (config.data / split_of(stage)).is_dir():
        return ASSUMED_CORPORA[stage]
    try:
        tokenizer = load_tokenizer(config.llm or LANGUAGE_MODELS[config.model])
    except OSError:
        return ASSUMED_CORPORA[stage]
    frames, points = (1, 1) if stage == 1 else (pite_config.num_frames, pite_config.num_points)
    data = StageDataset(
        config.data,
        stage,
        tokenizer,
        num_frames=frames,
        num_points=points,
        max_length=config.max_length,
        available=None,
        # Tokenizing takes minutes: keep the result for the run that follows.
        cache=config.samples if config.cache or config.store.is_dir() else None,
        failure_budget=config.failure_budget,
        turn=config.turn,
        narrative_timing=config.narrative_timing,
    )
    recipe = config.recipe(stage)
    plan = BatchPlan(len(data), recipe.global_batch, config.seed, data.groups() if recipe.group_media else None)
    warnings: list[str] = []
    check_tokens(data, tokenizer, pite_config, warnings.append)
    over = "" if data.over_length else f", none of more than {config.max_length:,} tokens"
    return Corpus(
        len(data),
        float(data.tokens.mean()),
        float(data.targets.mean()),
        len(set(data.media)),
        "; ".join([f"counted: {data.summary()}{over}", *warnings]),
        tuple(data.tokens[plan.samples(step)] for step in range(min(COUNTED_STEPS, plan.steps_per_epoch))),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the same as `engine.train --dry-run`."""
    config = parse(TrainConfig, argv, prog="python -m engine.budget")
    if Ranks.read().rank:
        return 0  # the same for all ranks of torchrun: rank 0 prints it
    try:
        print(report(config))
    except (ValueError, OSError) as error:
        print(f"engine.budget: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
