"""Compares the engine with reference numbers of the published model, in float32 on the CPU.

A reference directory holds `config.json`, `model.safetensors` under published names, `cases.safetensors` (padded
batches with the frames' position marked by -200, final-norm hidden states, last logits, one greedy decoding) and
`expected.json` (losses and gradient norms of each case).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from dataloaders.records import TokenizedSample
from dataloaders.samples.batch import PackedBatch, collate
from pite import names
from pite.checkpoint import from_pretrained
from pite.families import PITE
from pite.generate import language_model
from pite.model import Head, PiTe

TOLERANCE = 1e-4
FRAMES_HERE = -200
IGNORED = -100
HEADS: dict[int, Head] = {1: "localization", 2: "trajectory"}
"""The head that each stage trains; stage 3 trains on text alone."""


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is relative, or the number of wrong tokens if `limit` is 0."""

    name: str
    error: float
    limit: float = TOLERANCE

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def run(directory: Path) -> Iterator[Check]:
    """Yield every comparison that the reference directory allows. Raises ValueError for a missing file."""
    for name in ("config.json", "model.safetensors", "cases.safetensors", "expected.json"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name}: no such file; a reference directory must have it")
    cases = load_file(directory / "cases.safetensors")
    expected = json.loads((directory / "expected.json").read_text())
    model = load_model(directory, cases, expected)
    for case, numbers in expected.items():
        yield from _check_case(model, case, cases, numbers)
    if "greedy.sequences" in cases:
        yield _check_greedy(model, cases)


def load_model(directory: Path, cases: dict[str, Tensor], expected: dict[str, Any]) -> PiTe:
    """The reference's model. If its config has no head count, the one that reproduces its first hidden states."""
    config = json.loads((directory / "config.json").read_text())
    if isinstance(config.get("num_attention_heads"), int):
        return from_pretrained(directory)
    with safe_open(directory / "model.safetensors", framework="pt") as weights:
        queries, keys = (
            weights.get_slice(f"model.layers.0.self_attn.{name}_proj.weight").get_shape()[0] for name in "qk"
        )
    # Rotary embedding rotates pairs of channels, so a head has an even number of them.
    sizes = [size for size in range(2, keys + 1, 2) if keys % size == 0 and queries % size == 0]
    case, numbers = next(iter(expected.items()))
    shapes = [
        {"num_attention_heads": queries // size, "num_key_value_heads": keys // size, "head_dim": size}
        for size in sizes
    ]
    models = [_with_heads(directory, config | shape) for shape in shapes]
    return min(models, key=lambda model: _hidden_error(model, case, cases, numbers))


def _with_heads(directory: Path, config: dict[str, Any]) -> PiTe:
    with tempfile.TemporaryDirectory() as completed:
        Path(completed, "config.json").write_text(json.dumps(config))
        Path(completed, "model.safetensors").symlink_to((directory / "model.safetensors").resolve())
        return from_pretrained(completed)


def _check_case(model: PiTe, case: str, cases: dict[str, Tensor], numbers: dict[str, Any]) -> Iterator[Check]:
    batch = pack(case, cases, numbers)
    head = HEADS.get(numbers["stage"])
    hidden = model.hidden_states(batch, all_rows=True)
    yield Check(f"{case}: hidden states", _hidden_error(model, case, cases, numbers))
    last = model.logits(hidden[batch.cu_seqlens[1:].long() - 1])
    yield Check(f"{case}: last logits", relative(last, cases[f"{case}.logits_last"]))

    model.requires_grad_(True)
    model.zero_grad()
    losses = model(batch, head=head)
    smoothed = model(batch, head=head, label_smoothing=0.1)
    yield Check(f"{case}: cross-entropy", relative(losses.ce, numbers["ce_mean"]))
    yield Check(f"{case}: cross-entropy smoothed by 0.1", relative(smoothed.ce, numbers["ce_mean_label_smoothing_0.1"]))
    if head is not None:
        yield Check(f"{case}: L1", relative(losses.l1, numbers[f"{head}_l1_valid_mean"]))
    yield Check(f"{case}: loss", relative(losses.total, numbers["loss_valid_mean"]))
    losses.total.backward()
    gradients = gradient_norms(model)
    for name, norm in numbers["grad_norm"].items():
        yield Check(f"{case}: gradient of {name}", relative(gradients[name], norm))
    model.requires_grad_(False)


@torch.inference_mode()
def _check_greedy(model: PiTe, cases: dict[str, Tensor]) -> Check:
    prompt, sequence = cases["greedy.input_ids"][0].numpy(), cases["greedy.sequences"][0].tolist()
    features = cases["greedy.videos"][0]
    token_ids, frame_start = _splice(prompt, len(features))
    rows = torch.arange(frame_start, frame_start + len(features))
    inputs = model.embed(torch.from_numpy(token_ids), features, rows)[None]
    answer = sequence[len(prompt) :]
    # The reference did not stop at </s>.
    settings = GenerationConfig(max_new_tokens=len(answer), do_sample=False, use_cache=True, eos_token_id=None)
    generated = language_model(model).generate(inputs_embeds=inputs, generation_config=settings)[0].tolist()
    wrong = sum(a != b for a, b in zip(generated, answer, strict=True))
    return Check(f"greedy decoding of {len(answer)} tokens: wrong ones", wrong, limit=0)


def pack(case: str, cases: dict[str, Tensor], numbers: dict[str, Any]) -> PackedBatch:
    """A padded case as one packed row. A token is added to each sample, because the last one is not computed."""
    key = f"{case}.{HEADS.get(numbers['stage'], 'none')}"
    samples, features = [], []
    for i, length in enumerate(numbers["lens"]):
        token_ids, frame_start = _splice(cases[f"{case}.input_ids"][i, :length].numpy(), numbers["frames"])
        answer = np.flatnonzero(cases[f"{case}.labels"][i, :length].numpy() != IGNORED)
        trajectory = np.zeros((length, 1, 1, 2), dtype=np.float32) - 1
        if key in cases:
            # A location is a trajectory of one point in one frame.
            trajectory = cases[key][i, :length].numpy()
            trajectory = trajectory.reshape(length, *(trajectory.shape[1:-1] or (1, 1)), 2)
        tracked = np.flatnonzero((trajectory != -1).any((1, 2, 3)))
        samples.append(
            TokenizedSample(
                id=f"{case}.{i}",
                media=f"{case}.{i}",
                token_ids=np.append(token_ids, 0),
                frame_start=frame_start,
                num_features=numbers["frames"],
                target_positions=answer + numbers["frames"] - 1,
                trajectory_positions=tracked + numbers["frames"] - 1,
                trajectory=trajectory[tracked],
            )
        )
        features.append(cases[f"{case}.videos"][i].numpy())
        assert answer.min() > frame_start, "the frames come before the answer"
    return collate(samples, features, share=False)


def _splice(token_ids: np.ndarray, num_frames: int) -> tuple[np.ndarray, int]:
    """Token ids with the frame mark expanded to one 0 per frame, and the position of the first frame."""
    (place,) = np.flatnonzero(token_ids == FRAMES_HERE)
    return np.concatenate([token_ids[:place], np.zeros(num_frames, np.int64), token_ids[place + 1 :]]), int(place)


def gradient_norms(model: PiTe) -> dict[str, float]:
    """L2 norm of each published tensor's gradient."""
    gradients = {"lm_head.weight": model.lm_head.grad}
    for head in PITE.modules:
        gradients[f"model.{head}.weight"] = getattr(model, head).weight.grad
    for prefix, linear, parts in names.linear_layers(model):
        assert linear.weight.grad is not None
        for name, gradient in zip(parts, linear.weight.grad.split(linear.splits)):
            gradients[f"{prefix}{name}.weight"] = gradient
    return {name: gradient.norm().item() for name, gradient in gradients.items() if gradient is not None}


@torch.no_grad()
def _hidden_error(model: PiTe, case: str, cases: dict[str, Tensor], numbers: dict[str, Any]) -> float:
    """Largest relative error of any sample's hidden states."""
    batch = pack(case, cases, numbers)
    samples = model.hidden_states(batch, all_rows=True).split(batch.cu_seqlens.diff().tolist())
    return max(relative(hidden, cases[f"{case}.hidden.{i}"]) for i, hidden in enumerate(samples))


def relative(value: Tensor | float, expected: Tensor | float) -> float:
    """Norm of the difference divided by the norm of the expected value."""
    value, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (value, expected))
    return ((value - expected).norm() / expected.norm()).item()
