"""The training step and its peers: `python -m bench.step --model 7b` on a GPU, `pytest bench/test_step.py` on a CPU.

Every implementation trains the same LoRA and trajectory head with the same weights, samples and AdamW. They are timed
in turn, and only after their loss agrees with ours. Sample tokens are those of the
samples, not padding; ours computes the rows that samples share once, so it computes fewer.

  pite             packed: forward, backward, clipping and update as in engine.train
  pite loop        engine.loop.train: also with collation, copies to the device and the check for finite numbers; timed
                   before the others, not in turn with them
  pite compiled    `pite` with --compile
  pite fp8         `pite` with --frozen-dtype fp8 (sm_89 and newer)
  hf padded        transformers + peft as in earlier work (VTimeLLM's recipe): right-padded micro-batches of eight
                   samples in order, activation checkpointing, full logits, the head on every position
  hf padded, kept  the same without activation checkpointing
  hf packed        transformers + peft on the packed row, with liger-kernel on CUDA; attention is flash-attn if it is
                   installed, else ours
  unsloth          `hf padded` with unsloth's Llama and its activation checkpointing. It patches transformers for the
                   whole process, so it is not timed with the others; `--only unsloth` times it together with ours
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Timing, environment, interleaved
from bench.step.loop import loop_timing
from bench.step.peers import packed_step, padded_step, unsloth_step
from bench.step.problem import RECIPE, Problem, Step, copy_trainable, make_problem, paper_shape, tiny_shape
from engine.distributed.gradients import Gradients
from engine.distributed.world import grow_segments
from engine.hardware import peak_of
from engine.layout import count_parameters
from engine.loop import backward_order, compute_losses, make_optimizer
from pite.config import PiTeConfig
from pite.model import PiTe
from pite_kernels.fp8 import why_unsupported

RESULTS = Path(__file__).parent / "results"
OURS, LOOP, COMPILED, FP8, UNSLOTH = "pite", "pite loop", "pite compiled", "pite fp8", "unsloth"


def peer_bytes(config: PiTeConfig, peers: Sequence[str]) -> float:
    """Bytes that the peers hold while ours is timed: each its LoRA, gradient, moments; two also their own weights."""
    count = count_parameters(config, RECIPE)
    own_weights = 2 * count.linear * (FP8 in peers) + 2 * count.total * (UNSLOTH in peers)
    return 16 * (count.lora + count.heads) * len(peers) + own_weights


def compiled_step(problem: Problem) -> Step:
    model = copy_trainable(problem.model)
    model.decoder.compile_layers()
    return pite_step(replace(problem, model=model))


def fp8_step(problem: Problem) -> Step:
    reason = (
        "a CPU only emulates float8" if problem.model.device.type == "cpu" else why_unsupported(problem.model.device)
    )
    if reason is not None:
        raise ValueError(reason)
    model = copy_trainable(problem.model)
    model.quantize()
    return pite_step(replace(problem, model=model))


def pite_step(problem: Problem) -> Step:
    model = problem.model
    batches = [problem.pack(members) for members in problem.split()]
    optimizer = make_optimizer(model, RECIPE)
    gradients = Gradients(backward_order(model), 1)
    model.cast_lora()

    def step(update: bool = True) -> Sequence[Tensor]:
        total = torch.zeros((), device=model.device)
        for batch in batches:
            losses = compute_losses(model, batch, RECIPE)
            losses.total.backward()
            total += losses.total.detach()
        if update:
            torch.nn.utils.clip_grad_norm_([p for _, p in model.trainable()], RECIPE.max_grad_norm)
            optimizer.step()
            model.cast_lora()
        gradients.zero()
        return [total]

    return step


PEERS: dict[str, Callable[[Problem], Any]] = {
    OURS: pite_step,
    COMPILED: compiled_step,
    FP8: fp8_step,
    "hf padded": lambda problem: padded_step(problem, checkpointing=True),
    "hf padded, kept": lambda problem: padded_step(problem, checkpointing=False),
    "hf packed": packed_step,
    UNSLOTH: unsloth_step,
}
TOGETHER = (LOOP, *(name for name in PEERS if name != UNSLOTH))


@dataclass(frozen=True)
class Row:
    """The numbers of one implementation, or the `problem`, the reason for no numbers.

    tokens_per_second, slow, fast  tokens of the samples, shared ones counted for each: median, slowest and fastest 10%
    rows_per_second, mfu           of what was computed
    peak_gb       peak memory of tensors. Of ours: measured before the peers are built. Of a peer: what it allocated,
                  plus the frozen weights that it shares with ours
    reserved_gb   memory that the allocator reserved; only of ours
    estimated_gb  `engine.layout`'s estimate of peak_gb
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


def measure(model: str, problem: Problem, rounds: int, peers: Sequence[str] = TOGETHER) -> list[Row]:
    """Time ours and the peers whose loss agrees with ours within the rounding of the dtype, interleaved."""
    device, dtype = problem.model.device, problem.model.dtype
    memory: dict[str, tuple[float, float]] = {}
    steps: dict[str, Any] = {OURS: pite_step(problem)}
    if device.type == "cuda":
        memory[OURS] = _peak(steps[OURS], device)
    # The peers copy our weights as they are now, after these updates.
    expected = float(steps[OURS](update=False)[0])
    rows: list[Row] = []
    timings: dict[str, Timing] = {}

    def disagrees(name: str, loss: float) -> bool:
        exact = dtype == torch.float32 and name != FP8
        if abs(loss - expected) <= (1e-4 if exact else 2e-2) * abs(expected):
            return False
        rows.append(Row(model, name, problem=f"its loss is {loss:.6f}, ours {expected:.6f}"))
        return True

    if LOOP in peers:
        timing, loss = loop_timing(problem, rounds)
        if not disagrees(LOOP, loss):
            timings[LOOP] = timing
    for name in peers:
        if name in (OURS, LOOP):
            continue
        try:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            step = PEERS[name](problem)
            loss = float(step(update=False)[0])
            if device.type == "cuda":
                memory[name] = _peak(step, device)[0] - before + _shared(problem.model, name), 0.0
        except Exception as error:  # one failure must not stop the others
            kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
            rows.append(Row(model, name, problem=kind + str(error).partition("\n")[0]))
            continue
        if not disagrees(name, loss):
            steps[name] = step
    timings |= interleaved(steps, device, rounds)
    peak = peak_of(device)
    for name, timing in timings.items():
        row = _row(model, name, timing, problem, peak)
        if name in memory:
            row = replace(row, peak_gb=memory[name][0] / 1e9)
        if name == OURS and name in memory:
            row = replace(row, reserved_gb=memory[name][1] / 1e9, estimated_gb=problem.needed.total / 1e9)
        rows.append(row)
    return rows


def _row(model: str, name: str, timing: Timing, problem: Problem, peak: float | None) -> Row:
    """The speeds of an implementation, and its MFU by what it computes: ours computes shared rows once."""
    ours = name in (OURS, LOOP, COMPILED, FP8)
    rows = problem.rows if ours else problem.tokens
    read = sum(len(sample.target_positions) for sample in problem.samples) if ours else rows
    flops = count_parameters(problem.model.config, RECIPE).flops(rows, read)
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


def _shared(model: PiTe, peer: str) -> float:
    """Bytes of our frozen weights that a peer shares."""
    linear = {p for layer in model.decoder.layers for name, p in layer.named_parameters() if name.endswith(".weight")}
    own = {FP8: linear, UNSLOTH: set(model.parameters())}.get(peer, set())
    return float(sum(p.nbytes for p in model.parameters() if not p.requires_grad and p not in own))


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.tokens_per_second is None:
            print(f"  {row.implementation:16} {row.problem}")
            continue
        extra = "" if row.mfu is None else f"  MFU {row.mfu:.1%}"
        extra += "" if row.peak_gb is None else f"  {row.peak_gb:.1f} GB"
        extra += "" if row.estimated_gb is None else f" (estimated {row.estimated_gb:.1f})"
        print(
            f"  {row.implementation:16} {row.tokens_per_second:10,.0f} sample tokens/s "
            f"({row.slow:,.0f} to {row.fast:,.0f})  {row.videos_per_second:8,.1f} videos/s{extra}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("tiny", "7b", "13b"), default="tiny", help="shape; the weights are random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--token-budget", type=int, help="tokens per packed micro-batch; default: what fits")
    parser.add_argument("--memory", type=float, help="memory for the layout in GB; default: the device's")
    parser.add_argument("--only", nargs="+", choices=(LOOP, *PEERS), default=list(TOGETHER), help="implementations")
    parser.add_argument("--output", type=Path, help="result file; default: bench/results/step_<device>.json")
    options = parser.parse_args(arguments)
    grow_segments()  # as engine.train does
    device = torch.device(options.device)
    tiny = options.model == "tiny"
    shape = tiny_shape() if tiny else paper_shape(options.model)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    capacity = None
    if options.memory:
        capacity = options.memory * 1e9
    elif device.type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory - peer_bytes(shape.config, options.only)
    rank = 16 if tiny else RECIPE.lora_rank
    try:
        problem = make_problem(shape, device, dtype, rank, options.token_budget, capacity)
    except ValueError as error:
        print(f"bench.step: {error}, or measure fewer at once (--only)", file=sys.stderr)
        return 1
    rows = measure(options.model, problem, options.rounds, options.only)
    print(f"{options.model}: {len(problem.samples)} samples, {problem.tokens:,} tokens, {problem.rows:,} computed rows")
    show(rows)
    described = environment(device)
    path = options.output or RESULTS / f"step_{described['device'].split(',')[0].replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if row["model"] != options.model or row["implementation"] not in options.only]
    content = {
        "environment": described,
        "rows": kept + [vars(row) for row in rows if row.implementation in options.only],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
