"""The README's table of costs: memory and hours of each stage on eight devices, by the arithmetic of engine.budget."""

from __future__ import annotations

from pathlib import Path

from engine.budget.costs import MachineCost, run_costs
from engine.budget.text import PAPER_HOURS
from engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from engine.hardware import DEVICES
from engine.recipes import Size

SIZES: tuple[Size, ...] = ("7b", "13b")
NOWHERE = Path("/nonexistent")
"""In place of a data folder: the sizes of the data sets are those in their papers."""


def cost_table(results: Path) -> str:
    """One line per model and device, as Markdown.

    results  folder of bench.step's results; a device's measured efficiency replaces the assumed one
    """
    head = "| model | eight devices | GB a device | hours of stages 1, 2, 3 | all stages | basis |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(line for size in SIZES for line in _lines(size, results))])


def _lines(size: Size, results: Path) -> list[str]:
    run = RunConfig(devices=(8,), measured=results)
    config = TrainConfig(ModelConfig(size), DataConfig(NOWHERE, NOWHERE), run=run)
    stages = [cost.machines for cost in run_costs(config)]
    paper = f" (paper: about {PAPER_HOURS[size]:.0f} h)"
    return [_line(size, machines, paper if machines[0].device == "A100-80GB" else "") for machines in zip(*stages)]


def _line(size: Size, machines: tuple[MachineCost, ...], paper: str) -> str:
    (device,) = {machine.device for machine in machines}
    needed = [machine.needed.total / 1e9 for machine in machines if machine.needed is not None]
    hours = [machine.hours for machine in machines if machine.hours is not None]
    if len(needed) < len(machines) or len(hours) < len(machines):
        return f"| {size} | {device} | does not fit | | | |"
    memory = f"{min(needed):.0f} to {max(needed):.0f} of {DEVICES[device].bytes / 1e9:.0f}"
    measured = all(machine.measured for machine in machines)
    basis = f"{'measured' if measured else 'estimated'}, {machines[0].rate:.0%} of the bf16 peak"
    each = ", ".join(f"{hour:.2f}" for hour in hours)
    return f"| {size} | {device} | {memory} | {each} | {sum(hours):.2f} h{paper} | {basis} |"
