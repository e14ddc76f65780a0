"""Hours of a run on more devices than one host has: arithmetic, host, network, imbalance and set-up.

Counted are the bytes of each wire. Assumed, not measured, are the bandwidths, the imbalance where the data are not on disk, and
the set-up. Sharded weights are gathered inside a host, so only the gradients of the trainable parameters cross the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataloaders.partition import longest_first
from engine.budget.costs import Corpus, MachineCost, StageCost

PER_HOST = 8
"""Devices of a host."""

COUNTS = (8, 16, 32, 64, 128)

BUS = {"A100": 235e9, "H100": 360e9, "H200": 360e9}
"""Bytes a second of an all-reduce or all-gather over NVLink inside a host, by the device's name (assumed)."""

NETWORK = 0.85 * 25e9
"""Bytes a second between hosts: 200 Gb/s for each host, at 85% (assumed)."""

HOST_LAYER = 1.9e-3
"""Seconds of the host for a layer of a micro-batch, forward and backward (measured on a CPU without Triton's launches)."""

SET_UP = 120.0
"""Seconds of a stage before its first step and after its last, without its weights (assumed)."""

READING = 1e9
"""Bytes of weights a second that a host reads and checksums (assumed)."""

WORTH = 1.6
"""Twice the devices are worth it if a run is at least this many times as fast."""

_COUNTED_BATCHES = 20


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    compute   of the device with the most rows; host: of its launches, which run at the same time
    gather    of sharded weights, and reduce of gradients: what computation does not hide
    """

    compute: float
    host: float
    gather: float
    reduce: float

    @property
    def total(self) -> float:
        return max(self.compute, self.host) + self.gather + self.reduce


def step_time(cost: StageCost, machine: MachineCost, ranks: int, gradient_bytes: int = 4) -> StepTime:
    """A step of a stage on `ranks` devices in the layout of `machine`, which has a host's devices or fewer."""
    assert machine.layout is not None and machine.needed is not None and machine.hours is not None
    layers = cost.model.llm.num_hidden_layers
    busy = (
        machine.hours
        * 3600
        * machine.ranks
        / cost.steps
        / ranks
        * imbalance(cost.corpus, cost.recipe.global_batch, ranks)
    )
    micro_batches = -(-round(cost.rows / cost.steps / ranks) // machine.layout.token_budget)
    bus, local = BUS[machine.device.partition("-")[0]], min(ranks, PER_HOST)
    gather = 0.0
    if machine.layout.shards > 1:
        frozen = 2 * cost.parameters.layer * layers
        gather = 2 * micro_batches * frozen * (local - 1) / local / bus
    trained = gradient_bytes * (cost.parameters.lora + cost.parameters.heads)
    hosts = -(-ranks // PER_HOST)
    reduce = 2 * trained * ((local - 1) / local / bus if hosts == 1 else (hosts - 1) / hosts / NETWORK)
    backward = busy / micro_batches / 2
    host = HOST_LAYER * layers * micro_batches
    return StepTime(busy, host, max(0.0, gather - busy), max(0.0, reduce - backward))


def imbalance(corpus: Corpus, batch: int, ranks: int) -> float:
    """Rows of the rank with the most over the mean: counted for data on disk, else assumed."""
    if not corpus.batches:
        return 1 + 0.5 * ranks / batch
    loads = [longest_first(lengths.tokens, ranks)[1] for lengths in corpus.batches[:_COUNTED_BATCHES]]
    return float(np.mean([max(load) * ranks / sum(load) for load in loads]))


def run_hours(
    costs: Sequence[StageCost], machines: Sequence[MachineCost], ranks: int, gradient_bytes: int = 4
) -> float:
    """Hours of all stages with set-up."""
    seconds = 0.0
    for cost, machine in zip(costs, machines):
        seconds += (
            cost.steps * step_time(cost, machine, ranks, gradient_bytes).total
            + SET_UP
            + 2 * cost.parameters.total / READING
        )
    return seconds / 3600


def scaling_lines(costs: Sequence[StageCost], gradient_bytes: int = 4) -> list[str]:
    """For each kind of device, the hours of the run on 8 and more, and from how many on more do not pay.

    One line with the reason where these hours are unknown: a batch with less than a sample for each device of a host, or
    `--devices` without a whole host.
    """
    batch = min(cost.recipe.global_batch for cost in costs)
    if batch < PER_HOST:
        return [f"devices, more hosts: no hours for a batch of {batch}, less than a sample for each of {PER_HOST}"]
    if not any(machine.ranks == PER_HOST for cost in costs for machine in cost.machines):
        return [f"devices, more hosts: add {PER_HOST} to --devices for their hours"]
    counts = [count for count in COUNTS if count <= batch]
    lines = []
    for machines in zip(*(cost.machines for cost in costs)):
        if any(machine.ranks != PER_HOST or machine.hours is None for machine in machines):
            continue
        hours = {count: run_hours(costs, machines, count, gradient_bytes) for count in counts}
        most = next(n for n in counts if 2 * n not in hours or hours[n] / hours[2 * n] < WORTH)
        each = ", ".join(f"{count}: {hours[count]:.2f} h" for count in counts)
        lines.append(f"  {machines[0].device:<22}{each}; more than {most} do not pay at batch {batch}")
    if lines:
        head = (
            f"devices, {PER_HOST} in a host: hours with host, network, imbalance and set-up (estimated: {NETWORK / 1e9:.0f} GB/s "
            f"between hosts, {SET_UP:.0f} s a stage; more pay while twice as many are {WORTH} times as fast)"
        )
        lines.insert(0, head)
    return lines
