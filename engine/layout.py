"""Estimate a device's memory and choose the layout: copied or sharded weights, activation checkpointing, token budget.

The estimate is arithmetic, not a measurement. It counts activations tensor by tensor as the CUDA path saves them
(liger's RMS norm, rotary embedding and SwiGLU, a varlen attention, our LoRA and losses).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import Parallel
from engine.recipes import Recipe
from pite import checkpoint
from pite.config import PiTeConfig

RESERVED_SHARE = 0.1
"""Share of a device's memory reserved for the allocator, the communication library and errors of the estimate."""

MAX_TOKEN_BUDGET = 16384
"""Maximum tokens of a micro-batch: with more the GEMMs get no faster."""

CPU_TOKENS_PER_THREAD = 1024
"""Tokens of a micro-batch for each thread of a CPU. The activations of more tokens do not fit the caches; fewer leave
threads idle. At d 256, 13% faster than one row of 2,918 tokens on one thread; on two, 2,048 tokens are 7% faster than
1,024."""

MIN_TOKEN_BUDGET = 4096
"""Minimum tokens of a micro-batch: below it, activation checkpointing costs less time than the smaller GEMMs."""

CHECKPOINTED_BEFORE_SHARDING = 0.25
"""Maximum share of the layers with activation checkpointing before sharding is preferred to copied weights. That share
costs an eighth more FLOPs. Gathering 26 GB twice takes about a ninth of a 4,096-token step of 13B on A100s with NVLink,
most of it hidden behind computation."""

READ_SHARE = 0.9
"""Rows that a head reads, as a share of the computed rows, if the data are not known: an upper limit. By count it is .7 in
stage 1 and .4 in stages 2 and 3."""

LOSS_BYTES = 300e6
"""Bytes of the losses' chunks of logits and signs, with a vocabulary of 32,000."""

LOSS_ROWS = 2048
"""Maximum rows of a chunk of logits (`pite_kernels.gpu.cross_entropy`)."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the model, the layers' frozen linear weights, one layer, the LoRA, trainable adapter and heads.

    last  of `linear`, the last layer's weights that only the rows which a head reads are multiplied with
    """

    total: int
    linear: int
    last: int
    layer: int
    lora: int
    heads: int

    def flops(self, rows: float, read: float) -> float:
        """FLOPs of the frozen linear weights in training: 4N per computed row, and in the last layer per row `read`."""
        return 4 * (rows * (self.linear - self.last) + read * self.last)


def count_parameters(config: PiTeConfig, recipe: Recipe) -> ParameterCount:
    """Count on the meta device, without weights."""
    import torch

    model = checkpoint.empty(config, torch.bfloat16, "meta")
    total = sum(p.numel() for p in model.parameters())
    linear = sum(p.numel() for name, p in model.decoder.layers.named_parameters() if name.endswith(".weight"))
    layer = sum(p.numel() for p in model.decoder.layers[0].parameters())
    if recipe.lora_rank:
        model.add_lora(recipe.lora_rank, recipe.lora_alpha)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    model.set_trainable(recipe.trainable_modules)
    heads = sum(p.numel() for _, p in model.trainable()) - lora
    keys = 2 * config.llm.num_key_value_heads * config.head_dim * config.llm.hidden_size
    return ParameterCount(total, linear, linear // config.llm.num_hidden_layers - keys, layer, lora, heads)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: frozen weights; trainable parameters, gradients and moments; activations; loss chunks."""

    weights: float
    trained: float
    activations: float
    losses: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.activations + self.losses


@dataclass(frozen=True)
class Layout:
    """The layout of a stage.

    shards        ranks that share the frozen weights; 1: each rank has all of them
    recompute     number of layers with activation checkpointing
    token_budget  tokens of a micro-batch
    needed        estimated memory of a device
    """

    shards: int
    recompute: int
    token_budget: int
    needed: Memory

    def extra_flops(self, layers: int) -> float:
        """FLOPs of activation checkpointing, as a share of the step's own: the forward pass is half of a LoRA step."""
        return 0.5 * self.recompute / layers

    def describe(self, layers: int) -> str:
        weights = "weights copied" if self.shards == 1 else f"weights sharded over {self.shards} (FSDP2)"
        where = f" in {self.recompute} of {layers} layers" if self.recompute else ""
        checkpointing = f"{'' if self.recompute else 'no '}activation checkpointing{where}"
        return f"{weights}, {checkpointing}, {self.token_budget:,} rows a micro-batch"


def memory(
    config: PiTeConfig,
    count: ParameterCount,
    token_budget: int,
    width: int = 2,
    *,
    fp8: bool = False,
    recompute: int = 0,
    shards: int = 1,
    read: float = READ_SHARE,
    copied: float = 0.0,
) -> Memory:
    """Estimate the peak in bytes per device; `width` is the bytes of the frozen dtype.

    read    rows that a head reads, as a share of the computed rows
    copied  copies of keys of shared rows, as a share of the computed rows: kv_rows / rows - 1 of a `PackedBatch`

    Trainable parameters take 16 bytes each: float32 value, gradient and AdamW's two moments. The LoRA is held in the
    frozen dtype too.

    A layer without activation checkpointing holds, per row: both norms' inputs and outputs, q, k, v in their
    projection's output, the attention output, gate, up and their product, and the LoRA's x A'. A layer with it holds
    its input only, and all of these while its backward runs, when the layers above have freed theirs. Working memory is
    the MLP's gradients. The last layer holds norms, q, k, v and attention of all rows, and the rest of the read ones.

    Sharded weights are whole for two layers at a time, the one that computes and the prefetched one, and for the
    embeddings and the vocabulary head. float8 weights are held in two orientations, one byte each; quantized
    activations are temporary, and the MLP's gradient is the largest of them.
    """
    llm = config.llm
    hidden, inner, layers = llm.hidden_size, llm.intermediate_size, llm.num_hidden_layers
    queries = llm.num_attention_heads * config.head_dim
    keys = llm.num_key_value_heads * config.head_dim
    rank = count.lora // max(1, _lora_rows(config))
    q_copy, k_copy = (queries, keys) if config.architecture.qk_norm else (0, 0)  # heads' norms write copies
    inputs = bool(count.lora)  # of linear layers: a frozen one without a LoRA keeps none
    kept = (2 + 2 * inputs) * hidden + 2 * queries + 2 * keys * (1 + copied) + (2 + inputs) * inner
    kept += 7 * rank + q_copy + k_copy
    last = 2 * hidden + 2 * queries + 2 * keys * (1 + copied) + 2 * rank + k_copy
    last += read * (3 * hidden + queries + 3 * inner + 5 * rank + q_copy)
    working = width * (3 * inner + 3 * hidden) + 2 * inner * fp8
    top = bottom = 0.0
    if recompute < layers:
        top = width * kept * (layers - recompute - 1) + max(width * last + read * working, working)
    if recompute:
        bottom = width * kept + working
    frozen = width * (count.total - count.heads)
    layer = width * count.layer
    if fp8:
        frozen += (2 - width) * count.linear
        layer += (2 - width) * count.linear // layers
    if shards > 1:
        outside = frozen - layers * layer
        frozen = frozen // shards + 2 * layer + outside
    return Memory(
        weights=frozen,
        trained=16 * (count.lora + count.heads) + (width * count.lora if width < 4 else 0),
        activations=token_budget * (width * hidden * (recompute + 4) + max(top, bottom)),
        losses=LOSS_BYTES + width * LOSS_ROWS * max(0, llm.vocab_size - 32_000),
    )


def _lora_rows(config: PiTeConfig) -> int:
    """Parameters of a LoRA of rank 1."""
    llm = config.llm
    queries = llm.num_attention_heads * config.head_dim
    keys = llm.num_key_value_heads * config.head_dim
    hidden, inner = llm.hidden_size, llm.intermediate_size
    per_layer = (3 * hidden + queries + 2 * keys) + (queries + hidden) + (2 * hidden + 2 * inner) + (inner + hidden)
    return per_layer * llm.num_hidden_layers


def choose_layout(
    config: PiTeConfig,
    count: ParameterCount,
    capacity: float | None,
    *,
    ranks: int = 1,
    per_host: int | None = None,
    width: int = 2,
    fp8: bool = False,
    parallel: Parallel = "auto",
    recompute: int | None = None,
    token_budget: int | None = None,
    longest: int = 0,
    read: float = READ_SHARE,
    copied: float = 0.0,
) -> Layout:
    """The cheapest layout that fits.

    First choice: copied weights and activation checkpointing in few layers. Second: weights sharded inside each host, then
    over all hosts, whose network is slower. Last: activation checkpointing in as many layers as needed.
    per_host      ranks of each host; all of them unless given
    capacity      bytes of the device; None for a CPU: neither checkpointing nor sharding unless a flag sets it
    parallel, recompute, token_budget  values of the flags; None or "auto" means that this function chooses
    longest       tokens of the longest sample; a CPU's micro-batch holds at least these
    read, copied  of the training data, as in `memory`
    Raises ValueError if nothing fits, with the reason and what to change.
    """
    layers = config.llm.num_hidden_layers
    if recompute is not None and not 0 <= recompute <= layers:
        raise ValueError(f"--recompute must be 0 to {layers}, the model's layers, not {recompute}")

    def needed(tokens: int, shards: int, checkpointed: int) -> Memory:
        shares = {"read": read, "copied": copied}
        return memory(config, count, tokens, width, fp8=fp8, recompute=checkpointed, shards=shards, **shares)

    sharded = tuple(dict.fromkeys(shards for shards in (per_host or ranks, ranks) if shards > 1)) or (1,)
    kinds = {"ddp": (1,), "fsdp": sharded, "auto": tuple(dict.fromkeys((1, *sharded)))}[parallel]
    if capacity is None:
        budget = token_budget or max(min(MAX_TOKEN_BUDGET, CPU_TOKENS_PER_THREAD * torch.get_num_threads()), longest)
        return Layout(kinds[0], recompute or 0, budget, needed(budget, kinds[0], recompute or 0))
    room = capacity * (1 - RESERVED_SHARE)
    least = token_budget or MIN_TOKEN_BUDGET
    depths = range(layers + 1) if recompute is None else (recompute,)
    few = int(CHECKPOINTED_BEFORE_SHARDING * layers)
    candidates = [(shards, checkpointed) for shards in kinds for checkpointed in depths]
    if recompute is None and len(kinds) > 1:
        candidates.sort(key=lambda candidate: candidate[0] == 1 and candidate[1] > few)
    for shards, checkpointed in candidates:
        if needed(least, shards, checkpointed).total <= room:
            fixed, one = (needed(n, shards, checkpointed) for n in (0, 1))
            most = min(int((room - fixed.total) / one.activations) // 512 * 512, MAX_TOKEN_BUDGET)
            most = token_budget or most
            return Layout(shards, checkpointed, most, needed(most, shards, checkpointed))
    tightest = needed(least, kinds[-1], depths[-1])
    raise ValueError(
        f"a micro-batch of {least:,} tokens needs {tightest.total / 1e9:.0f} GB, "
        f"{tightest.weights / 1e9:.0f} of them weights, and a device of {capacity / 1e9:.0f} GB "
        f"has room for {room / 1e9:.0f}: lower --token-budget, "
        "leave --recompute and --parallel to the engine, or use more devices"
    )
