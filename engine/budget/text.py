"""The costs of a run as text."""

from __future__ import annotations

from collections.abc import Sequence

from engine.budget.costs import MachineCost, StageCost
from engine.budget.scaling import scaling_lines
from engine.hardware import ASSUMED_MFU, CLIP_MFU, DEVICES
from engine.layout import Memory

PAPER_HOURS = {"7b": 10.0, "13b": 17.0}
"""The paper's training time of all three stages on eight A100s."""


def report(costs: Sequence[StageCost], gradient_bytes: int = 4) -> str:
    """Every stage of a run, and the sum of the hours next to the paper's.

    gradient_bytes  of each number that the ranks exchange
    """
    lines = [line for cost in costs for line in _stage_lines(cost)]
    if len(costs) > 1:
        lines += _together(costs)
    lines += scaling_lines(costs, gradient_bytes)
    return "\n".join(lines)


def _stage_lines(cost: StageCost) -> list[str]:
    parameters, corpus, recipe = cost.parameters, cost.corpus, cost.recipe
    lines = [
        f"stage {cost.stage}, {cost.size} ({cost.shape})",
        f"  parameters      {parameters.total / 1e6:,.1f} M, of which trained: LoRA {parameters.lora / 1e6:,.1f} M"
        f" + adapter and heads {parameters.heads / 1e6:,.1f} M",
        f"  data            {corpus.samples:,} samples, {corpus.tokens:,.0f} tokens and {corpus.targets:,.0f} targets"
        f" each ({corpus.origin})",
        f"  steps           {cost.steps:,} of {recipe.global_batch} samples, {recipe.epochs} epochs,"
        f" {cost.tokens / 1e6:,.1f} M tokens, no padding",
        f"  computed        {cost.rows / 1e6:,.1f} M rows, {cost.rows / cost.tokens:.0%} of the tokens: what samples share"
        " is computed once",
        f"  arithmetic      {cost.flops:.2e} FLOPs (4N per computed row, attention, vocabulary head)",
        *_published(cost),
        f"  attention       {cost.attention}",
        f"  {'GB of a device:':<25} hours   of peak   needed of   {'   '.join(_PARTS)}",
    ]
    layers = cost.model.llm.num_hidden_layers
    lines += [f"  {_name(machine):<22}{_machine_text(machine, layers)}" for machine in cost.machines]
    if any(machine.hours is not None and not machine.measured for machine in cost.machines):
        lines.append("  * assumed, not measured: bench/results holds no such step")
    return lines


def _published(cost: StageCost) -> list[str]:
    """The published recipe's arithmetic for the same samples: PG-Video-LLaVA's computes every row of all samples, and each
    layer's forward pass twice."""
    if not cost.model.choices.marks:
        return []
    linear, llm = 6 * cost.tokens * cost.parameters.linear, cost.model.llm
    logits = 4 * cost.tokens * llm.vocab_size * llm.hidden_size
    eight = [flops / (8 * DEVICES["A100-80GB"].peak * ASSUMED_MFU) / 3600 for flops in (linear + logits, cost.flops)]
    return [
        f"  published       {linear + logits:.2e} FLOPs in the published recipe (activation checkpointing in all layers, logits"
        f" of all rows): {eight[0]:.2f} h on 8x A100 at {ASSUMED_MFU:.0%} of the peak, and {eight[1]:.2f} h here (counted)"
    ]


def _together(costs: Sequence[StageCost]) -> list[str]:
    lines = [f"stages {', '.join(str(cost.stage) for cost in costs)} together"]
    for machines in zip(*(cost.machines for cost in costs)):
        hours = [machine.hours for machine in machines if machine.hours is not None]
        if len(hours) == len(costs):
            lines.append(f"  {_name(machines[0]):<22}{sum(hours):7.2f} h")
    eight = 8 * DEVICES["A100-80GB"].peak * 3600
    floor, encoding = sum(cost.flops for cost in costs) / eight, sum(cost.encoding for cost in costs) / eight
    # Stage 3 may use the videos of stage 2; then this counts them twice.
    lines.append(
        f"  features        {encoding / CLIP_MFU:.2f} h of 8x A100 for CLIP, once for all models and runs,"
        f" at {CLIP_MFU:.0%} of the bfloat16 peak (assumed, not measured)"
    )
    paper = PAPER_HOURS.get(costs[0].size)
    lines.append(
        f"  floor           {floor:.2f} h on 8x A100 at 100% of the peak, {floor + encoding:.2f} h with the features"
        + (f"; the paper took about {paper:.0f} h" if paper else "")
    )
    return lines


def _name(machine: MachineCost) -> str:
    return f"{machine.ranks}x {machine.device}"


def _machine_text(machine: MachineCost, layers: int) -> str:
    if machine.layout is None or machine.needed is None:
        return machine.refusal
    text = "      -       -  "
    if machine.hours is not None:
        text = f"{machine.hours:7.2f}{machine.rate:9.0%}{' ' if machine.measured else '*'}"
    full = "" if machine.filled is None else f", {machine.filled:.0%} full"
    return (
        f"{text}{machine.needed.total / 1e9:10.0f} of {DEVICES[machine.device].bytes / 1e9:3.0f}{_parts(machine.needed)}"
        f"   {machine.layout.describe(layers)}{full}"
    )


_PARTS = ("weights", "LoRA, heads", "gradients", "AdamW", "activations", "losses")


def _parts(needed: Memory) -> str:
    """The columns of `_PARTS`: frozen weights; trainable parameters, gradients, two moments; activations; losses."""
    trained = needed.trained / 4
    values = (needed.weights, trained, trained, 2 * trained, needed.activations, needed.losses)
    return "".join(f"{value / 1e9:{len(name) + 3}.1f}" for name, value in zip(_PARTS, values))
