"""What a run will cost, before it costs anything: parameters, tokens, FLOPs, memory per device, hours.

LoRA on frozen weights is counted as what it is: 2N FLOPs per token forward and 2N for the gradient of the activations,
none for the frozen weights' own gradient. Only useful tokens count; there is no padding to hide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.parallel import World
from engine.recipes import LANGUAGE_MODELS, Recipe, Stage
from pite import checkpoint
from pite.config import PiTeConfig

if TYPE_CHECKING:
    from engine.train import TrainConfig

PEAK_BF16: dict[str, float] = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s of each device's data sheet."""

MEMORY: dict[str, float] = {"A100": 80e9, "H100": 80e9, "H200": 141e9}
"""Bytes on each device."""

SPARE = 0.1
"""Share of a device's memory left to the allocator, the communication library and what the estimate misses."""

LARGEST_BUDGET = 16384
"""Tokens of a micro-batch beyond which the GEMMs gain nothing more."""

ASSUMED_MFU = 0.45
"""Share of the peak taken for the hours; an assumption until bench/results holds a measured step."""


@dataclass(frozen=True)
class Corpus:
    """Size of a stage's training set: samples, and means per sample."""

    samples: int
    tokens: float
    targets: float
    origin: str


ASSUMED_CORPORA: dict[Stage, Corpus] = {
    1: Corpus(692_458, 115, 55, "assumed: Localized Narratives' four training sets, 55 answer tokens"),
    2: Corpus(143_640, 215, 65, "assumed: PiTe-143k, 2.4 events and 7.1 mentions per video"),
    3: Corpus(173_000, 260, 90, "assumed: Valley 73k and VideoInstruct100K, 90 answer tokens"),
}
"""Stand-ins for training sets that are not on disk, from their papers' counts."""


@dataclass(frozen=True)
class ParameterCount:
    total: int
    linear: int
    lora: int
    heads: int


def count_parameters(config: PiTeConfig, recipe: Recipe) -> ParameterCount:
    """Count on the meta device; no weights are needed. `linear` are those every token passes through."""
    model = checkpoint.empty(config, torch.bfloat16, "meta")
    total = sum(p.numel() for p in model.parameters())
    linear = sum(p.numel() for name, p in model.decoder.layers.named_parameters() if name.endswith(".weight"))
    model.add_lora(recipe.lora_rank, recipe.lora_alpha)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    model.set_trainable(recipe.learns)
    return ParameterCount(total, linear, lora, sum(p.numel() for _, p in model.trainable()) - lora)


def step_flops(config: PiTeConfig, linear: int, tokens: float, targets: float, mean_length: float) -> float:
    """FLOPs of training on `tokens` packed tokens: 4N each, causal attention at the mean length, frozen vocabulary head."""
    llm = config.llm
    width = llm.num_attention_heads * config.head_dim
    attention = 6 * width * mean_length * llm.num_hidden_layers
    return tokens * (4 * linear + attention) + targets * 4 * llm.vocab_size * llm.hidden_size


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    trained: float
    activations: float
    losses: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.activations + self.losses


def memory(config: PiTeConfig, count: ParameterCount, token_budget: int, width: int = 2) -> Memory:
    """Estimate bytes per device with every activation kept; `width` is the bytes of the frozen dtype.

    Trained parameters cost 16 bytes each: float32 value, gradient and AdamW's two moments. Kept per token and layer:
    both norms' inputs and outputs, q, k, v before and after rotation, the attention output, gate, up and their product.
    """
    llm = config.llm
    queries = llm.num_attention_heads * config.head_dim
    keys = llm.num_key_value_heads * config.head_dim
    per_layer = 4 * llm.hidden_size + 2 * (queries + keys) + keys + 2 * queries + 3 * llm.intermediate_size
    trained = count.lora + count.heads
    return Memory(
        weights=width * (count.total - count.heads),
        trained=16 * trained,
        activations=token_budget * width * (per_layer * llm.num_hidden_layers + 4 * llm.hidden_size),
        losses=300e6,
    )


def fitting_token_budget(config: PiTeConfig, count: ParameterCount, capacity: float, width: int = 2) -> int:
    """The most tokens of a micro-batch, in steps of 512, whose activations fit a device of `capacity` bytes.

    Raises ValueError when the weights alone do not.
    """
    fixed = memory(config, count, 0, width).total
    per_token = memory(config, count, 1, width).activations
    tokens = int((capacity * (1 - SPARE) - fixed) / per_token) // 512 * 512
    if tokens <= 0:
        raise ValueError(
            f"{fixed / 1e9:.0f} GB of weights and optimizer leave no room for a batch on a device of {capacity / 1e9:.0f} GB"
        )
    return min(tokens, LARGEST_BUDGET)


def device_token_budget(config: PiTeConfig, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> int:
    """`fitting_token_budget` of this machine's device; CPUs take the largest."""
    if device.type != "cuda":
        return LARGEST_BUDGET
    capacity = torch.cuda.get_device_properties(device).total_memory
    return fitting_token_budget(config, count_parameters(config, recipe), capacity, dtype.itemsize)


def efficiency(config: PiTeConfig, recipe: Recipe, world: World) -> Callable[[int, float], dict[str, float]]:
    """A function of a step's useful tokens and seconds that gives MFU (4N) and peak memory where they are known."""
    if world.device.type != "cuda":
        return lambda tokens, seconds: {}
    name = torch.cuda.get_device_name(world.device)
    peak = next((flops for device, flops in PEAK_BF16.items() if device in name), None)
    linear = count_parameters(config, recipe).linear

    def measure(tokens: int, seconds: float) -> dict[str, float]:
        numbers = {"memory_gb": torch.cuda.max_memory_allocated(world.device) / 1e9}
        if peak is not None:
            numbers["mfu"] = tokens * 4 * linear / seconds / (peak * world.size)
        return numbers

    return measure


def report(config: TrainConfig) -> str:
    """The dry run's text for every stage that was asked for."""
    lines = []
    for stage in config.stages:
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
        devices = []
        for name, peak in PEAK_BF16.items():
            tokens_there = config.token_budget or fitting_token_budget(pite_config, count, MEMORY[name])
            needed = memory(pite_config, count, tokens_there)
            hours = flops / (8 * peak * ASSUMED_MFU) / 3600
            devices.append(
                f"  8x {name:<5}        {hours:5.2f} h at {ASSUMED_MFU:.0%} of the bfloat16 peak (assumed, not measured);"
                f" {needed.total / 1e9:.0f} of {MEMORY[name] / 1e9:.0f} GB each: weights {needed.weights / 1e9:.1f}, trained"
                f" {needed.trained / 1e9:.1f}, activations {needed.activations / 1e9:.1f} ({tokens_there:,} tokens a"
                f" micro-batch, nothing recomputed), losses {needed.losses / 1e9:.1f}"
            )
        lines += [
            f"stage {stage}, {config.model} ({shape_origin})",
            f"  parameters      {count.total / 1e6:,.1f} M, of which trained: LoRA {count.lora / 1e6:,.1f} M"
            f" + adapter and heads {count.heads / 1e6:,.1f} M",
            f"  data            {corpus.samples:,} samples, {corpus.tokens:,.0f} tokens and {corpus.targets:,.0f} targets"
            f" each ({corpus.origin})",
            f"  steps           {steps:,} of {recipe.global_batch} samples, {recipe.epochs} epochs,"
            f" {tokens / 1e6:,.1f} M tokens, no padding",
            f"  arithmetic      {flops:.2e} FLOPs (4N per token, attention, vocabulary head)",
            *devices,
        ]
    return "\n".join(lines)


def _shape(config: TrainConfig) -> tuple[PiTeConfig, str]:
    """The model's shape: a local language model's, or the preset's where there is none on disk."""
    from engine.build import model_config

    llm = Path(config.llm or "").expanduser()
    if config.llm and llm.is_dir():
        if (config.store / "videos").is_dir():
            return model_config(llm, config.store, config.num_points), str(llm)
        return PiTeConfig.load(llm, num_points=config.num_points), str(llm)
    if config.model == "tiny":
        raise ValueError(f"{config.llm} is no directory: the miniature's shape is not known without it")
    return PiTeConfig.preset(config.model), f"shape of {LANGUAGE_MODELS[config.model]}"


def _corpus(config: TrainConfig, stage: Stage, pite_config: PiTeConfig) -> Corpus:
    """A stage's training set as it is on disk, or the assumed one when it is not there."""
    from transformers import AutoTokenizer

    from dataloaders.dataset import StageDataset

    if not (config.data / f"stage{stage}").is_dir():
        return ASSUMED_CORPORA[stage]
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.llm or LANGUAGE_MODELS[config.model])
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
    )
    return Corpus(
        len(data),
        float(data.tokens.mean()),
        float(data.targets.mean()),
        f"counted: {data.summary()}",
    )
