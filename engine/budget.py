"""What a run will cost, before it costs anything: `python -m engine.budget` takes the flags of engine.train.

Parameters, tokens, FLOPs, memory per device, hours. LoRA on frozen weights is counted as what it is: 2N FLOPs per token
forward and 2N for the gradient of the activations, none for the frozen weights' own gradient. Only useful tokens count;
there is no padding to hide.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataloaders.plan import BatchPlan, split_batch
from engine.config import parse
from engine.memory import choose_layout, count_parameters
from engine.parallel import World
from engine.recipes import LANGUAGE_MODELS, Recipe, Stage
from engine.train_config import TrainConfig
from kernels.attention import choose_backend
from pite.config import PiTeConfig


@dataclass(frozen=True)
class Device:
    """Dense bfloat16 FLOP/s of the data sheet, bytes, and whether there is float8 arithmetic."""

    peak: float
    bytes: float
    fp8: bool


DEVICES: dict[str, Device] = {
    "A100-40GB": Device(312e12, 40e9, False),
    "A100-80GB": Device(312e12, 80e9, False),
    "H100": Device(989e12, 80e9, True),
    "H200": Device(989e12, 141e9, True),
}

PEAK_BF16: dict[str, float] = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    **{name.partition("-")[0]: device.peak for name, device in DEVICES.items()},
}
"""Dense bfloat16 FLOP/s by what is part of the name that the driver gives a device; the first that fits counts."""

COUNTS = (1, 8)
"""Devices for which hours are printed."""

ASSUMED_MFU = 0.45
"""Share of the peak taken for the hours where bench/results holds no measured step."""

ASSUMED_FP8_GAIN = 1.3
"""How much faster a step with float8 frozen weights is taken to be where none was measured: what the project aims at."""

COUNTED_STEPS = 100
"""Global batches that are split to see how full their micro-batches are."""

RESULTS = Path(__file__).parents[1] / "bench" / "results"

PAPER_HOURS = {"7b": 10.0, "13b": 17.0}
"""The paper's training time of all three stages on eight A100s."""


@dataclass(frozen=True)
class Corpus:
    """Size of a stage's training set: samples, means per sample, samples left out for their length.

    batches  tokens of each sample of the first global batches, where the data are there to be counted
    """

    samples: int
    tokens: float
    targets: float
    origin: str
    batches: tuple[np.ndarray, ...] = ()


ASSUMED_CORPORA: dict[Stage, Corpus] = {
    1: Corpus(692_458, 115, 55, "assumed: Localized Narratives' four training sets, 55 answer tokens"),
    2: Corpus(143_640, 215, 65, "assumed: PiTe-143k, 2.4 events and 7.1 mentions per video"),
    3: Corpus(173_000, 260, 90, "assumed: Valley 73k and VideoInstruct100K, 90 answer tokens"),
}
"""Stand-ins for training sets that are not on disk, from their papers' counts."""


def fullness(batches: Sequence[np.ndarray], ranks: int, token_budget: int) -> float:
    """Useful tokens over the token budget of all micro-batches that the global batches are split into.

    Raises ValueError where a sample exceeds the budget.
    """
    planned = sum(len(of_rank) for batch in batches for of_rank in split_batch(batch, ranks, token_budget))
    return sum(int(batch.sum()) for batch in batches) / (planned * token_budget)


def step_flops(config: PiTeConfig, linear: int, tokens: float, targets: float, mean_length: float) -> float:
    """FLOPs of training on `tokens` packed tokens: 4N each, causal attention at the mean length, frozen vocabulary head."""
    llm = config.llm
    width = llm.num_attention_heads * config.head_dim
    attention = 6 * width * mean_length * llm.num_hidden_layers
    return tokens * (4 * linear + attention) + targets * 4 * llm.vocab_size * llm.hidden_size


def measured_mfu(size: str, device: str, results: Path, fp8: bool = False) -> float | None:
    """The best MFU of our step on this model and device in bench/results/step_*.json, or None."""
    ours = {"pite fp8"} if fp8 else {"pite", "pite compiled"}
    found = [
        row["mfu"]
        for file in sorted(results.glob("step_*.json"))
        for content in [json.loads(file.read_text())]
        if device.partition("-")[0] in content["environment"]["device"]
        for row in content["rows"]
        if row["model"] == size and row["implementation"] in ours and row.get("mfu")
    ]
    return max(found, default=None)


def device_capacity(device: torch.device) -> float | None:
    """Bytes of a CUDA device; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def efficiency(config: PiTeConfig, recipe: Recipe, world: World) -> Callable[[int, float], dict[str, float]]:
    """A function of a step's useful tokens and seconds that gives MFU (4N) and peak memory where they are known."""
    if world.device.type != "cuda":
        return lambda tokens, seconds: {}
    name = torch.cuda.get_device_name(world.device)
    peak = next((flops for known, flops in PEAK_BF16.items() if known in name), None)
    linear = count_parameters(config, recipe).linear

    def measure(tokens: int, seconds: float) -> dict[str, float]:
        numbers = {"memory_gb": torch.cuda.max_memory_allocated(world.device) / 1e9}
        if peak is not None:
            numbers["mfu"] = tokens * 4 * linear / seconds / (peak * world.size)
        return numbers

    return measure


@dataclass(frozen=True)
class _Cost:
    """A stage's arithmetic, the same with recomputation on each device that it fits, and the text."""

    flops: float
    executed: dict[str, float]
    lines: list[str]


def report(config: TrainConfig) -> str:
    """The dry run's text for every stage that was asked for, and the sum beside the paper's hours."""
    costs = [_stage_cost(config, stage) for stage in config.stages]
    lines = [line for cost in costs for line in cost.lines]
    if len(costs) > 1:
        flops = sum(cost.flops for cost in costs)
        floor = flops / (8 * DEVICES["A100-80GB"].peak) / 3600
        paper = PAPER_HOURS.get(config.model)
        lines.append(f"stages {', '.join(map(str, config.stages))} together")
        for name in DEVICES:
            if all(name in cost.executed for cost in costs):
                executed = sum(cost.executed[name] for cost in costs)
                lines.append(f"  {name:<15} {_hours(config.model, name, executed, config.frozen_dtype == 'fp8')}")
        lines.append(
            f"  8x A100         {floor:.2f} h is the arithmetic floor (100% of the peak)"
            + (f"; the paper took about {paper:.0f} h" if paper else "")
        )
    return "\n".join(lines)


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
    ]
    executed: dict[str, float] = {}
    fp8 = config.frozen_dtype == "fp8"
    for name, device in DEVICES.items():
        if fp8 and not device.fp8:
            lines.append(f"  {name:<15} has no float8 arithmetic")
            continue
        try:
            layout = choose_layout(
                pite_config, count, device.bytes, ranks=8, fp8=fp8, parallel=config.parallel, recompute=config.recompute,
                token_budget=config.token_budget,
            )  # fmt: skip
            full = f", {fullness(corpus.batches, 8, layout.token_budget):.0%} full" if corpus.batches else ""
        except ValueError as error:
            lines.append(f"  {name:<15} does not fit: {error}")
            continue
        needed = layout.needed
        executed[name] = flops * (1 + layout.extra_flops(pite_config.llm.num_hidden_layers))
        lines += [
            f"  {name:<15} {_hours(config.model, name, executed[name], fp8)}",
            f"  {'':<15} {needed.total / 1e9:.0f} of {device.bytes / 1e9:.0f} GB each, of eight: weights"
            f" {needed.weights / 1e9:.1f}, trained {needed.trained / 1e9:.1f}, activations"
            f" {needed.activations / 1e9:.1f}, losses {needed.losses / 1e9:.1f};"
            f" {layout.describe(pite_config.llm.num_hidden_layers)}{full}",
        ]
    return _Cost(flops, executed, lines)


def _hours(model: str, name: str, flops: float, fp8: bool) -> str:
    """`12.1 h on 1, 1.5 h on 8, at 45% ...`"""
    measured = measured_mfu(model, name, RESULTS, fp8)
    rate = measured or ASSUMED_MFU * (ASSUMED_FP8_GAIN if fp8 else 1)
    hours = ", ".join(f"{flops / (n * DEVICES[name].peak * rate) / 3600:.2f} h on {n}" for n in COUNTS)
    return f"{hours}, at {rate:.0%} of the bfloat16 peak ({'measured' if measured else 'assumed, not measured'})"


def _attention(config: TrainConfig, pite_config: PiTeConfig) -> str:
    """What would compute attention on this machine."""
    here = torch.device("cuda:0" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype, llm = config.torch_dtype(here), pite_config.llm
    name = choose_backend(here, dtype, llm.num_attention_heads, llm.num_key_value_heads, pite_config.head_dim)
    device = torch.cuda.get_device_name(here) if here.type == "cuda" else "a CPU"
    return f"by {name} on this machine ({device}, {dtype})"


def _shape(config: TrainConfig) -> tuple[PiTeConfig, str]:
    """The model's shape: a local language model's, or the preset's where there is none on disk."""
    from engine.build import RANDOM, model_config, random_shape

    if config.llm == RANDOM:
        return random_shape(config.model, config.num_points), "random weights"
    llm = Path(config.llm or "").expanduser()
    if config.llm and llm.is_dir():
        if (config.store / "videos").is_dir():
            return model_config(llm, config.store, config.num_points), str(llm)
        return PiTeConfig.load(llm, num_points=config.num_points), str(llm)
    if config.model == "tiny":
        raise ValueError(f"{config.llm} is no directory: the miniature's shape is not known without it")
    unseen = f"; {config.llm} is no directory and was not looked at" if config.llm else ""
    return PiTeConfig.preset(config.model), f"shape of {LANGUAGE_MODELS[config.model]}{unseen}"


def _corpus(config: TrainConfig, stage: Stage, pite_config: PiTeConfig) -> Corpus:
    """A stage's training set as it is on disk, or the assumed one when it is not there."""
    from dataloaders.dataset import StageDataset
    from engine.build import load_tokenizer

    if not config.data.is_dir() and config.data != TrainConfig.data:
        raise ValueError(f"{config.data}: no such data folder")
    if not (config.data / f"stage{stage}").is_dir():
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
        # Tokenizing takes minutes: the run that follows finds what the dry run made.
        cache=config.store / "samples" if config.store.is_dir() else None,
        failure_budget=config.failure_budget,
        turn=config.turn,
        narrative_timing=config.narrative_timing,
    )
    recipe = config.recipe(stage)
    plan = BatchPlan(len(data), recipe.global_batch, config.seed, data.groups() if recipe.group_media else None)
    return Corpus(
        len(data),
        float(data.tokens.mean()),
        float(data.targets.mean()),
        f"counted: {data.summary()}",
        tuple(data.tokens[plan.samples(step)] for step in range(min(COUNTED_STEPS, plan.steps_per_epoch))),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the same as `engine.train --dry-run`."""
    config = parse(TrainConfig, argv, prog="python -m engine.budget")
    try:
        print(report(config))
    except (ValueError, OSError) as error:
        print(f"engine.budget: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
