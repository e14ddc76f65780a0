"""The training step against its peers: `python -m bench.step --model 7b` on a GPU, `pytest bench/test_step.py` on a CPU.

Every implementation trains the same LoRA and trajectory head of the same weights on the same samples, with AdamW, and is
timed in turn; none is timed before its loss agrees with ours. Useful tokens are the samples' own, padding never counts.

  pite             packed, as engine.train runs it
  hf padded        transformers + peft as the predecessors train: right-padded micro-batches of eight samples in order,
                   gradient checkpointing, full logits, the head on every position (VTimeLLM's recipe)
  hf padded, kept  the same without gradient checkpointing
  hf packed        transformers + peft + liger-kernel on the packed row (CUDA with flash-attn)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from bench.measure import environment, interleaved
from dataloaders.batch import PackedBatch, collate
from dataloaders.plan import split_batch
from dataloaders.records import ABSENT, TokenizedSample
from engine.budget import PEAK_BF16
from engine.gradients import Gradients
from engine.loop import backward_order, compute_losses, make_optimizer
from engine.memory import choose_layout, count_parameters
from engine.recipes import PAPER, Recipe
from pite import checkpoint, names
from pite.config import PiTeConfig
from pite.generate import language_model
from pite.model import PiTe

RESULTS = Path(__file__).parent / "results"
OURS = "pite"
PADDED_BATCH = 8
RECIPE: Recipe = PAPER[2]


@dataclass(frozen=True)
class Shape:
    """A model and a global batch of samples like PiTe-143k's: `answer` tokens on average, gamma-distributed."""

    config: PiTeConfig
    samples: int
    prompt: int
    answer: int


def tiny_shape() -> Shape:
    llm = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=4000
    )
    return Shape(PiTeConfig(llm, num_frames=32, num_points=3, vision_feature_size=64), samples=32, prompt=24, answer=32)


def paper_shape(size: str) -> Shape:
    return Shape(PiTeConfig.preset("13b" if size == "13b" else "7b"), samples=256, prompt=50, answer=65)


def make_samples(shape: Shape, seed: int = 0) -> tuple[list[TokenizedSample], list[np.ndarray]]:
    """Samples whose answers vary in length (gamma of shape 2: spread .7 of the mean), four tenths of them with tracks."""
    rng = np.random.default_rng(seed)
    config = shape.config
    samples, features = [], []
    for i in range(shape.samples):
        answer = 8 + int(rng.gamma(2.0, (shape.answer - 8) / 2))
        start = shape.prompt // 2
        ids = rng.integers(3, config.llm.vocab_size, shape.prompt + config.num_frames + answer)
        ids[start : start + config.num_frames] = 0
        targets = np.arange(len(ids) - answer, len(ids))
        placed = targets[rng.random(answer) < 0.4]
        trajectory = rng.random((len(placed), config.num_points, config.num_frames, 2), dtype=np.float32)
        trajectory[rng.random(trajectory.shape[:3]) < 0.3] = ABSENT
        samples.append(TokenizedSample(f"s{i}", f"m{i}", ids, start, config.num_frames, targets, placed, trajectory))
        features.append(rng.standard_normal((config.num_frames, config.vision_feature_size)).astype(np.float16))
    return samples, features


@dataclass(frozen=True)
class Problem:
    """The model with its LoRA and the samples that every implementation takes."""

    model: PiTe
    samples: list[TokenizedSample]
    features: list[np.ndarray]
    token_budget: int

    @property
    def tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.samples)

    @property
    def normalizers(self) -> tuple[float, float]:
        targets = sum(len(s.target_positions) for s in self.samples)
        return targets, sum(s.num_coordinates for s in self.samples)

    def pack(self, members: Sequence[int]) -> PackedBatch:
        samples, features = [self.samples[i] for i in members], [self.features[i] for i in members]
        return collate(samples, features, normalizers=self.normalizers).to(self.model.device)


def make_problem(
    shape: Shape, device: torch.device, dtype: torch.dtype, rank: int, token_budget: int | None
) -> Problem:
    torch.manual_seed(0)
    model = checkpoint.random_model(shape.config, dtype=dtype, device=str(device))
    model.add_lora(rank, 2.0 * rank)
    model.set_trainable(RECIPE.learns)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.01, generator=generator))
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    count = count_parameters(shape.config, RECIPE)
    samples, features = make_samples(shape)
    longest = max(len(s.token_ids) for s in samples)
    layout = choose_layout(
        shape.config, count, capacity, width=dtype.itemsize, token_budget=token_budget, longest=longest
    )
    model.decoder.recompute(layout.recompute)
    return Problem(model, samples, features, layout.token_budget)


Step = Callable[[], Sequence[Tensor]]


def pite_step(problem: Problem) -> Step:
    model = problem.model
    (bins,) = split_batch([len(s.token_ids) for s in problem.samples], 1, problem.token_budget)
    batches = [problem.pack(members) for members in bins if members]
    optimizer = make_optimizer(model, RECIPE)
    gradients = Gradients(backward_order(model), 1)

    def step(update: bool = True) -> Sequence[Tensor]:
        total = torch.zeros((), device=model.device)
        for batch in batches:
            losses = compute_losses(model, batch, RECIPE, "skip")
            losses.total.backward()
            total += losses.total.detach()
        if update:
            torch.nn.utils.clip_grad_norm_([p for _, p in model.trainable()], RECIPE.max_grad_norm)
            optimizer.step()
        gradients.zero()
        return [total]

    return step


class HuggingFace(nn.Module):
    """transformers' Llama with peft's LoRA, and the trajectory head of the published code, on copies of our weights."""

    def __init__(self, problem: Problem) -> None:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        super().__init__()
        model = problem.model
        lora = {name: tensor.clone() for name, tensor in names.lora_tensors(model).items()}
        _, linear, _ = next(names.linear_layers(model))
        assert linear.lora_b is not None
        rank = linear.lora_b.shape[1]
        merged = names.merged_tensors
        names.merged_tensors = names.language_model_tensors  # the frozen weights themselves, shared
        try:
            llama = language_model(model)
        finally:
            names.merged_tensors = merged
        targets = sorted(part.split(".")[1] for parts in names.PROJECTIONS.values() for part in parts)
        config = LoraConfig(r=rank, lora_alpha=linear.scale * rank, target_modules=targets, lora_dropout=0.0)
        self.llama: Any = get_peft_model(llama, config)
        set_peft_model_state_dict(self.llama, lora)
        self.problem = problem
        outputs, inputs = model.trajectory_projector.weight.shape
        self.head = nn.Linear(inputs, outputs).to(model.device)
        self.head.load_state_dict(model.trajectory_projector.state_dict())
        self.llama.train()

    def embed(self, batch: PackedBatch) -> Tensor:
        model = self.problem.model
        return model.embed(batch.token_ids, batch.features, batch.feature_rows).detach()

    def loss(self, hidden: Tensor, logits: Tensor, labels: Tensor, tracks: Tensor) -> Tensor:
        """hidden (..., d) predicts labels (...) and tracks (..., P, N, 2); -100 and (-1, -1) carry no loss."""
        tokens, coordinates = self.problem.normalizers
        smoothing = RECIPE.label_smoothing
        ce = F.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten(), label_smoothing=smoothing, reduction="sum"
        )
        predicted = self.head(hidden.to(self.head.weight.dtype)).view(tracks.shape)
        present = (tracks != ABSENT).all(-1, keepdim=True)
        return ce / tokens + RECIPE.trajectory_weight * ((predicted - tracks).abs() * present).sum() / coordinates


def padded_step(problem: Problem, checkpointing: bool) -> Step:
    model, config = HuggingFace(problem), problem.model.config
    device = problem.model.device
    if checkpointing:
        model.llama.enable_input_require_grads()
        model.llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = []
    for start in range(0, len(problem.samples), PADDED_BATCH):
        members = range(start, min(start + PADDED_BATCH, len(problem.samples)))
        lengths = [len(problem.samples[i].token_ids) for i in members]
        shape = (len(lengths), max(lengths))
        embedded = torch.zeros(*shape, config.llm.hidden_size, dtype=problem.model.dtype, device=device)
        mask = torch.zeros(shape, dtype=torch.long, device=device)
        labels = torch.full(shape, -100, device=device)
        tracks = torch.full((*shape, config.num_points, config.num_frames, 2), float(ABSENT), device=device)
        for row, (i, length) in enumerate(zip(members, lengths)):
            sample = problem.samples[i]
            with torch.no_grad():
                embedded[row, :length] = model.embed(problem.pack([i]))
            mask[row, :length] = 1
            at = torch.from_numpy(sample.target_positions - 1).to(device)
            labels[row, at] = torch.from_numpy(sample.token_ids[sample.target_positions]).to(device)
            at = torch.from_numpy(sample.trajectory_positions - 1).to(device)
            tracks[row, at] = torch.from_numpy(sample.trajectory).to(device)
        batches.append((embedded, mask, labels, tracks))
    return _hf_step(model, batches, lambda embedded, mask: {"inputs_embeds": embedded, "attention_mask": mask})


def packed_step(problem: Problem) -> Step:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    if problem.model.device.type != "cuda":
        raise ValueError("not available: packing in transformers needs flash-attn, which needs CUDA")
    import flash_attn  # noqa: F401

    model = HuggingFace(problem)
    llama = model.llama.get_base_model()
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=llama)
    llama.set_attn_implementation("flash_attention_2")
    config, device = problem.model.config, problem.model.device
    (bins,) = split_batch([len(s.token_ids) for s in problem.samples], 1, problem.token_budget)
    batches = []
    for members in bins:
        batch = problem.pack(members)
        labels = torch.full((1, batch.num_tokens), -100, device=device)
        labels[0, batch.target_rows] = batch.target_ids
        tracks = torch.full(
            (1, batch.num_tokens, config.num_points, config.num_frames, 2), float(ABSENT), device=device
        )
        tracks[0, batch.trajectory_rows] = batch.trajectory
        batches.append((model.embed(batch)[None], batch.position_ids.long()[None], labels, tracks))
    return _hf_step(model, batches, lambda embedded, at: {"inputs_embeds": embedded, "position_ids": at})


def _hf_step(model: HuggingFace, batches: list[Any], inputs: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> Step:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RECIPE.learning_rate, weight_decay=0.0, fused=True)

    def step(update: bool = True) -> Sequence[Tensor]:
        total = torch.zeros((), device=model.head.weight.device)
        for embedded, second, labels, tracks in batches:
            out = model.llama(**inputs(embedded, second), output_hidden_states=True, use_cache=False)
            loss = model.loss(out.hidden_states[-1], out.logits, labels, tracks)
            loss.backward()
            total += loss.detach()
        if update:
            torch.nn.utils.clip_grad_norm_(learning, RECIPE.max_grad_norm)
            optimizer.step()
        optimizer.zero_grad()
        return [total]

    return step


PEERS: dict[str, Callable[[Problem], Any]] = {
    OURS: pite_step,
    "hf padded": lambda problem: padded_step(problem, checkpointing=True),
    "hf padded, kept": lambda problem: padded_step(problem, checkpointing=False),
    "hf packed": packed_step,
}


@dataclass(frozen=True)
class Row:
    """One implementation's numbers; `problem` says why there are none."""

    model: str
    implementation: str
    tokens_per_second: float | None = None
    slow: float | None = None
    fast: float | None = None
    videos_per_second: float | None = None
    mfu: float | None = None
    peak_gb: float | None = None
    problem: str | None = None


def measure(model: str, problem: Problem, rounds: int, peers: Sequence[str] = tuple(PEERS)) -> list[Row]:
    """Time the peers whose loss agrees with ours within the dtype's rounding, interleaved."""
    device, dtype = problem.model.device, problem.model.dtype
    steps: dict[str, Any] = {}
    rows: list[Row] = []
    expected = math.nan
    for name in peers:
        try:
            step = PEERS[name](problem)
            loss = float(step(update=False)[0])
        except (ImportError, ValueError, torch.OutOfMemoryError) as error:
            rows.append(Row(model, name, problem=str(error).splitlines()[0]))
            continue
        expected = loss if name == OURS else expected
        if not abs(loss - expected) <= (1e-4 if dtype == torch.float32 else 2e-2) * abs(expected):
            rows.append(Row(model, name, problem=f"its loss is {loss:.6f}, ours {expected:.6f}"))
            continue
        steps[name] = step
    timings = interleaved(steps, device, rounds)
    linear = count_parameters(problem.model.config, RECIPE).linear
    known = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for name, flops in PEAK_BF16.items() if name in known), None)
    for name, timing in timings.items():
        rate = problem.tokens / timing.median
        rows.append(
            Row(
                model,
                name,
                rate,
                problem.tokens / timing.high,
                problem.tokens / timing.low,
                len(problem.samples) / timing.median,
                None if peak is None else rate * 4 * linear / peak,
                None if timing.peak_bytes is None else timing.peak_bytes / 1e9,
            )
        )
    return rows


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.tokens_per_second is None:
            print(f"  {row.implementation:16} {row.problem}")
            continue
        extra = "" if row.mfu is None else f"  MFU {row.mfu:.1%}"
        print(
            f"  {row.implementation:16} {row.tokens_per_second:10,.0f} useful tokens/s "
            f"({row.slow:,.0f} to {row.fast:,.0f})  {row.videos_per_second:8,.1f} videos/s{extra}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("tiny", "7b", "13b"), default="tiny", help="shape, with random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--token-budget", type=int, help="tokens of a packed micro-batch; what fits otherwise")
    parser.add_argument("--only", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="implementations")
    parser.add_argument("--output", type=Path, help="result file; bench/results/step_<device>.json otherwise")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    tiny = options.model == "tiny"
    shape = tiny_shape() if tiny else paper_shape(options.model)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    problem = make_problem(shape, device, dtype, 16 if tiny else RECIPE.lora_rank, options.token_budget)
    rows = measure(options.model, problem, options.rounds, options.only)
    print(f"{options.model}: {len(problem.samples)} samples, {problem.tokens:,} tokens")
    show(rows)
    described = environment(device)
    path = options.output or RESULTS / f"step_{described['device'].split(',')[0].replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if row["model"] != options.model]
    content = {"environment": described, "rows": kept + [vars(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
