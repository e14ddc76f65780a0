"""One row of the step benchmark per implementation: checked against our loss, timed in turn or alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.measure import Timing, interleaved
from bench.step.implementations import (
    FP8,
    IN_PACKED_ROWS,
    LOOP,
    OURS,
    PACKED,
    STEPS,
    TOGETHER,
    UNSHARED,
    UNSLOTH,
    fp8_step_in_place,
    pite_step,
)
from bench.step.loop import loop_timing
from bench.step.problem import RECIPE, Problem
from engine.hardware import peak_of
from engine.layout import MIN_TOKEN_BUDGET, count_parameters
from pite.model import PiTe


@dataclass(frozen=True)
class Row:
    """The numbers of one implementation, or the `problem`, the reason for no numbers.

    tokens_per_second, slow, fast  tokens of the samples, shared ones counted for each: median, slowest and fastest 10%
    rows_per_second, mfu           of what was computed
    peak_gb       peak memory of tensors. Timed in turn, ours is measured before the peers are built. Of the others: what
                  they allocated, plus the frozen weights that they share with ours
    reserved_gb   memory that the allocator reserved; only of ours
    estimated_gb  `engine.layout`'s estimate of peak_gb for the largest micro-batch
    token_budget  of the micro-batches; padded ones have eight samples each
    """

    model: str
    implementation: str
    tokens_per_second: float | None = None
    slow: float | None = None
    fast: float | None = None
    videos_per_second: float | None = None
    mfu: float | None = None
    peak_gb: float | None = None
    estimated_gb: float | None = None
    problem: str | None = None
    reserved_gb: float | None = None
    rows_per_second: float | None = None
    token_budget: int | None = None


def measure(model: str, problem: Problem, rounds: int, peers: Sequence[str] = TOGETHER) -> list[Row]:
    """Time ours and the peers whose loss agrees with ours within the rounding of the dtype, interleaved."""
    device = problem.model.device
    memory: dict[str, tuple[float, float]] = {}
    steps: dict[str, Any] = {OURS: pite_step(problem)}
    if device.type == "cuda":
        memory[OURS] = _peak(steps[OURS], device)
    # The peers copy our weights as they are now, after these updates.
    expected = float(steps[OURS](update=False)[0])
    rows: list[Row] = []
    timings: dict[str, Timing] = {}
    if LOOP in peers:
        timing, loss = loop_timing(problem, rounds)
        if wrong := _disagrees(problem, LOOP, loss, expected):
            rows.append(Row(model, LOOP, problem=wrong))
        else:
            timings[LOOP] = timing
    for name in peers:
        if name in (OURS, LOOP):
            continue
        try:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            step = STEPS[name](problem)
            loss = float(step(update=False)[0])
            if device.type == "cuda":
                memory[name] = _peak(step, device)[0] - before + _shared(problem.model, name), 0.0
        except Exception as error:  # one failure must not stop the others
            rows.append(Row(model, name, problem=_failure(error)))
            continue
        if wrong := _disagrees(problem, name, loss, expected):
            rows.append(Row(model, name, problem=wrong))
        else:
            steps[name] = step
    timings |= interleaved(steps, device, rounds)
    for name, timing in timings.items():
        row = _row(model, name, timing, problem)
        if name in memory:
            row = replace(row, peak_gb=memory[name][0] / 1e9)
        if name == OURS and name in memory:
            row = replace(row, reserved_gb=memory[name][1] / 1e9, estimated_gb=problem.needed().total / 1e9)
        rows.append(row)
    return rows


def measure_alone(model: str, problem: Problem, rounds: int, names: Sequence[str]) -> Iterator[Row]:
    """Build, check and time one implementation after the other, each alone on the device; yields each one's row.

    Peers get half the token budget again as long as they run out of memory. FP8 quantizes the problem's model, so it has
    to be the last name.
    """
    assert FP8 not in names[:-1]
    device = problem.model.device
    expected = float(STEPS[OURS](problem)(update=False)[0])
    _free(device)
    for name in names:
        budget = problem.token_budget
        row = _alone(model, problem, rounds, name, expected)
        _free(device)
        while name == PACKED and row is None and budget > MIN_TOKEN_BUDGET:
            budget //= 2
            row = _alone(model, replace(problem, token_budget=budget), rounds, name, expected)
            _free(device)
        size = f" with {budget:,} tokens a micro-batch" if name == PACKED else ""
        yield row or Row(model, name, problem=f"out of memory{size}")


def _alone(model: str, problem: Problem, rounds: int, name: str, expected: float) -> Row | None:
    """None if the device ran out of memory."""
    device, cuda = problem.model.device, problem.model.device.type == "cuda"
    shared = _shared(problem.model, name)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        if name == LOOP:
            timing, loss = loop_timing(problem, rounds)
        else:
            step: Any = fp8_step_in_place(problem) if name == FP8 else STEPS[name](problem)
            loss = float(step(update=False)[0])
            step()
            if cuda:  # without what building allocated
                torch.cuda.reset_peak_memory_stats(device)
            timing = interleaved({name: step}, device, rounds, warmups=1)[name]
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        return Row(model, name, problem=_failure(error))
    if wrong := _disagrees(problem, name, loss, expected):
        return Row(model, name, problem=wrong)
    row = replace(_row(model, name, timing, problem), token_budget=problem.token_budget)
    if not cuda:
        return row
    # The weights that FP8 has replaced are in `before`.
    peak = torch.cuda.max_memory_allocated(device) - (0 if name == FP8 else before - shared)
    row = replace(row, peak_gb=peak / 1e9, reserved_gb=torch.cuda.max_memory_reserved(device) / 1e9)
    if name in (*IN_PACKED_ROWS, UNSHARED):
        needed = problem.needed(fp8=name == FP8, share=name != UNSHARED)
        row = replace(row, estimated_gb=needed.total / 1e9)
    return row


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _disagrees(problem: Problem, name: str, loss: float, expected: float) -> str | None:
    """The problem if a loss differs from ours by more than the rounding of the dtype."""
    exact = problem.model.dtype == torch.float32 and name != FP8
    if abs(loss - expected) <= (1e-4 if exact else 2e-2) * abs(expected):
        return None
    return f"its loss is {loss:.6f}, ours {expected:.6f}"


def _failure(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
    return kind + str(error).partition("\n")[0]


def _row(model: str, name: str, timing: Timing, problem: Problem) -> Row:
    """The speeds of an implementation, and its MFU by what it computes: ours computes shared rows once."""
    if name in (*IN_PACKED_ROWS, UNSHARED):
        batches = problem.batches(share=name != UNSHARED)
        rows, read = (sum(counts) for counts in zip(*((b.num_rows, len(b.target_ids)) for b in batches)))
    else:
        rows = read = problem.tokens
    flops = count_parameters(problem.model.config, RECIPE).flops(rows, read)
    peak = peak_of(problem.model.device)
    return Row(
        model,
        name,
        problem.tokens / timing.median,
        problem.tokens / timing.high,
        problem.tokens / timing.low,
        len(problem.samples) / timing.median,
        None if peak is None else flops / timing.median / peak,
        rows_per_second=rows / timing.median,
    )


def _peak(step: Any, device: torch.device) -> tuple[float, float]:
    """Peak bytes of tensors in a step, and bytes reserved by the allocator; the optimizer's moments already exist."""
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return float(torch.cuda.max_memory_allocated(device)), float(torch.cuda.max_memory_reserved(device))


def _shared(model: PiTe, name: str) -> float:
    """Bytes of our frozen weights that an implementation shares."""
    linear = {p for layer in model.decoder.layers for key, p in layer.named_parameters() if key.endswith(".weight")}
    own = {FP8: linear, UNSLOTH: set(model.parameters())}.get(name, set())
    return float(sum(p.nbytes for p in model.parameters() if not p.requires_grad and p not in own))


def describe(row: Row) -> str:
    """One line for the terminal."""
    if row.tokens_per_second is None:
        return f"  {row.implementation:16} {row.problem}"
    extra = "" if row.mfu is None else f"  MFU {row.mfu:.1%}"
    extra += "" if row.peak_gb is None else f"  {row.peak_gb:.1f} GB"
    extra += "" if row.estimated_gb is None else f" (estimated {row.estimated_gb:.1f})"
    return (
        f"  {row.implementation:16} {row.tokens_per_second:10,.0f} sample tokens/s "
        f"({row.slow:,.0f} to {row.fast:,.0f})  {row.videos_per_second:8,.1f} videos/s{extra}"
    )
