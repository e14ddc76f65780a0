"""Compares the engine with reference numbers of the published PG-Video-LLaVA, in float32 on the CPU.

A reference directory holds the model under published names, its CLIP and its sentencepiece tokenizer; `cases.safetensors`
with frames, records, padded training batches, prompts and one greedy decoding; and `expected.json` with losses, gradient
norms, frame indices and the tolerance of each kind of number. No number here depends on the shapes of one directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from dataloaders.decode.preprocess import nearest
from dataloaders.decode.sampling import segment_indices
from dataloaders.records import Sample, TokenizedSample, Turn
from dataloaders.samples.batch import PackedBatch, collate
from dataloaders.samples.marked import Marks, tokenize
from pite.checkpoint import from_pretrained
from pite.config import PiTeConfig
from pite.generate import language_model
from pite.model import PiTe
from pite.pooled import PooledEncoder, pool
from pite.tokenizers import load_tokenizer
from tests.golden import pg_prompts
from tests.golden.check import Check, relative

FRAMES = 100
MODULES = ("mm_projector", "vid_edges")
RATE, STEPS_CLIP = 2e-3, 1.0


def is_reference(directory: Path) -> bool:
    """Whether a reference directory is of this family: its configuration marks the two ends of a video."""
    file = directory / "config.json"
    return file.is_file() and "mm_use_vid_start_end" in json.loads(file.read_text())


class Reference:
    """A directory's files, and its tolerances."""

    def __init__(self, directory: Path) -> None:
        for name in ("model.safetensors", "cases.safetensors", "expected.json", "clip", "tokenizer"):
            if not (directory / name).exists():
                raise ValueError(f"{directory / name}: no such file; a reference directory must have it")
        self.directory = directory
        self.cases = load_file(directory / "cases.safetensors")
        self.expected: dict[str, Any] = json.loads((directory / "expected.json").read_text())
        self._limits: dict[str, Any] = self.expected["about"]["tolerance"]
        self.tokenizer = load_tokenizer(directory / "tokenizer")
        self.batches = [name for name, values in self.expected.items() if "ce_tokens" in values]

    def limit(self, name: str) -> float:
        """The tolerance of a number by its name in the directory: that of the longest pattern."""
        matching = [p for p, limit in self._limits.items() if isinstance(limit, float) and fnmatch(name, p)]
        return float(self._limits[max(matching, key=len)])

    def check(self, name: str, value: Tensor | float, expected: Tensor | float | None = None) -> Check:
        expected = self.cases[name] if expected is None else expected
        return Check(name, relative(value, expected), self.limit(name))

    @cached_property
    def model(self) -> PiTe:
        return from_pretrained(self.directory)

    def marks(self, num_features: int) -> Marks:
        tokens = self.model.config.video_tokens
        assert tokens is not None
        return Marks(*tokens, num_features)


def run(directory: Path) -> Iterator[Check]:
    """Yield every comparison that the directory allows. Raises ValueError for a missing file."""
    reference = Reference(directory)
    yield from _check_frames(reference)
    yield from _check_pixels(reference)
    for case in reference.batches:
        yield from _check_batch(reference, case)
    yield from _check_learning(reference)
    yield from pg_prompts.check(reference)
    yield _check_greedy(reference)


def wrong(name: str, found: Any, expected: Any) -> Check:
    """A comparison of whole numbers: `error` is the number of different ones."""
    found, expected = np.asarray(found), np.asarray(expected)
    count = max(found.size, expected.size, 1) if found.shape != expected.shape else int((found != expected).sum())
    return Check(f"{name}: different ones", count, limit=0)


def _check_frames(reference: Reference) -> Iterator[Check]:
    for total, indices in reference.expected["frame_indices"].items():
        yield wrong(f"frame_indices of {total}", segment_indices(int(total), FRAMES), indices)
    resize = reference.expected["resize"]
    for target in resize["targets"]:
        columns = np.stack([nearest(size, target) for size in resize["sizes"]])
        yield wrong(f"resize.columns_{target}", columns, reference.cases[f"resize.columns_{target}"])


def _check_pixels(reference: Reference) -> Iterator[Check]:
    encoder, cases = PooledEncoder(reference.directory / "clip"), reference.cases
    for video in reference.expected["pixels"]:
        name = f"pixels.{video}"
        frames = cases[f"{name}.frames"][segment_indices(len(cases[f"{name}.frames"]), FRAMES)]
        squashed = encoder.preprocess.cropped_batch(frames)
        alone = np.stack([encoder.preprocess.cropped(frame) for frame in frames.numpy()])
        if f"{name}.squashed" in cases:
            yield wrong(f"{name}.squashed", squashed, cases[f"{name}.squashed"])
            yield wrong(f"{name}.squashed one by one", alone, cases[f"{name}.squashed"])
        if f"{name}.pixel_values" in cases:
            yield reference.check(f"{name}.pixel_values", encoder.preprocess.normalized(squashed))
        if f"{name}.frame_features" in cases:
            yield reference.check(f"{name}.frame_features", encoder.encode(squashed))
        padded = torch.cat([squashed, squashed.new_zeros(FRAMES - len(squashed), *squashed.shape[1:])])
        yield reference.check(f"{name}.record", encoder.records(padded, [len(squashed)])[0].half())
    for name in ("pooling", "pooling_tiny"):
        features = cases[f"{name}.features"]
        padded = torch.cat([features, features.new_full((FRAMES - len(features), *features.shape[1:]), 9.0)])
        yield reference.check(f"{name}.record", pool(padded[None], torch.tensor([len(features)]))[0].half())


def _check_batch(reference: Reference, case: str) -> Iterator[Check]:
    cases, numbers, model = reference.cases, reference.expected[case], reference.model
    for i, text in enumerate(numbers["texts"]):
        sample = tokenize(_parsed(text), reference.tokenizer, reference.marks(numbers["video_tokens"]))
        length, labels = numbers["lens"][i], cases[f"{case}.labels"][i].numpy()
        ids = np.where(sample.token_ids == 0, model.config.llm.vocab_size - 3, sample.token_ids)
        yield wrong(f"{case}.input_ids of {i}", ids, cases[f"{case}.input_ids"][i, :length])
        yield wrong(f"{case}.labels of {i}", sample.target_positions, np.flatnonzero(labels != -100))
        if f"{case}.projected.{i}" in cases:
            yield reference.check(f"{case}.projected.{i}", model.project(cases[f"{case}.videos"][i]))
    # A token more in each sample, because the last one is not computed.
    longer = _packed(reference, case, more=1, share=False)
    with torch.no_grad():
        hidden = model.hidden_states(longer, all_rows=True)
        for i, rows in enumerate(hidden.split(longer.cu_seqlens.diff().tolist())):
            if f"{case}.hidden.{i}" in cases:
                yield reference.check(f"{case}.hidden.{i}", rows)
        yield reference.check(f"{case}.logits_last", model.logits(hidden[longer.cu_seqlens[1:].long() - 1]))
        for i, total in enumerate(numbers["ce_sum_of_sample"]):
            alone = model(_packed(reference, case, only=i, normalizers=(1.0, 1.0))).ce
            yield reference.check(f"{case}.ce_sum_of_sample.{i}", alone, total)
    for share in (False, True):
        yield from _check_gradients(reference, case, share)


def _check_gradients(reference: Reference, case: str, share: bool) -> Iterator[Check]:
    model, numbers = reference.model, reference.expected[case]
    model.set_trainable(MODULES)
    model.zero_grad()
    batch = _packed(reference, case, share=share)
    loss = model(batch).total
    loss.backward()
    model.set_trainable(())
    note = ", shared" if share else ""
    mean = reference.check(f"{case}.ce_mean", loss, numbers["ce_mean"])
    yield Check(mean.name + note, mean.error, mean.limit)
    gradients = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients["model.embed_tokens.weight"] = gradients.pop("model.vid_edges")
    found = {f"{case}.grad.{name.removeprefix('model.')}": tensor for name, tensor in gradients.items()}
    edges = gradients["model.embed_tokens.weight"]
    found |= {f"{case}.grad.vid_start": edges[0], f"{case}.grad.vid_end": edges[1]}
    for name in sorted(found.keys() & reference.cases.keys()):
        checked = reference.check(name, found[name])
        yield Check(name + note, checked.error, checked.limit)
    for name, norm in numbers["grad_norm"].items():
        yield reference.check(f"{case}.grad_norm.{name}{note}", gradients[name].norm(), norm)


def _check_learning(reference: Reference) -> Iterator[Check]:
    expected, case = reference.expected["learning"], reference.expected["learning"]["batch"]
    model = from_pretrained(reference.directory)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.set_trainable(MODULES)
    parameters = [parameter for _, parameter in model.trainable()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    batch, losses, norms = _packed(reference, case), [], []
    for _ in expected["losses"]:
        optimizer.zero_grad()
        loss = model(batch).total
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, STEPS_CLIP)))
        losses.append(loss.item())
        optimizer.step()
    yield reference.check("learning.losses", torch.tensor(losses), torch.tensor(expected["losses"]))
    before_clipping = torch.tensor(expected["gradient_norms_before_clipping"])
    yield reference.check("learning.gradient_norms_before_clipping", torch.tensor(norms), before_clipping)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, frozen[name])}
    wanted = {name.removeprefix("model.") for name in expected["changed_tensors"]}
    yield Check(
        "learning: wrong tensors that changed", len(moved ^ (wanted - {"embed_tokens.weight"} | {"vid_edges"})), 0
    )
    after = {f"learning.{name}_after": p for name, p in model.named_parameters()}
    after["learning.vid_rows_after"] = after.pop("learning.vid_edges_after")
    for name in sorted(after.keys() & reference.cases.keys()):
        yield reference.check(name, after[name])


@torch.inference_mode()
def _check_greedy(reference: Reference) -> Check:
    model, cases = reference.model, reference.cases
    prompt, sequence = cases["greedy.input_ids"][0], cases["greedy.sequences"][0].tolist()
    record = cases["greedy.video"]
    start = int((prompt == model.config.llm.vocab_size - 3).nonzero()[0])
    rows = torch.arange(start, start + len(record))
    embeddings = model.embed(prompt, record, rows)[None]
    answer = sequence[len(prompt) :]
    settings = GenerationConfig(max_new_tokens=len(answer), do_sample=False, use_cache=True, eos_token_id=None)
    generated = language_model(model).generate(inputs_embeds=embeddings, generation_config=settings)[0]
    return wrong(f"greedy.sequences, {len(answer)} tokens", generated, answer)


def _packed(
    reference: Reference,
    case: str,
    *,
    more: int = 0,
    only: int | None = None,
    share: bool = True,
    normalizers: tuple[float, float] | None = None,
) -> PackedBatch:
    """A padded case as one packed row, with `more` tokens at the end of each sample."""
    cases, numbers = reference.cases, reference.expected[case]
    config: PiTeConfig = reference.model.config
    samples, records = [], []
    for i, length in enumerate(numbers["lens"]):
        ids = cases[f"{case}.input_ids"][i, :length].numpy()
        features = np.flatnonzero(ids == config.llm.vocab_size - 3)
        targets = np.flatnonzero(cases[f"{case}.labels"][i, :length].numpy() != -100)
        none, nowhere = np.zeros((0, 1, 1, 2), np.float32), np.zeros(0, np.int64)
        ids = np.concatenate([ids, np.zeros(more, np.int64)])
        sample = TokenizedSample(str(i), str(i), ids, int(features[0]), len(features), targets, nowhere, none)
        samples.append(sample)
        records.append(cases[f"{case}.videos"][i].numpy())
    chosen = slice(None) if only is None else slice(only, only + 1)
    return collate(samples[chosen], records[chosen], share=share, normalizers=normalizers)


def _parsed(text: str) -> Sample:
    """The sample of a training text, in which {video} stands for the video."""
    conversation = text[text.index("USER: ") :]
    turns, video_first = [], False
    for i, turn in enumerate(filter(None, conversation.split("</s>"))):
        human, _, answer = turn.removeprefix("USER: ").partition(" ASSISTANT: ")
        if i == 0:
            video_first = human.startswith("{video}")
            human = human.replace("{video}\n", "").replace("\n{video}", "")
        turns.append(Turn(human, answer))
    return Sample("", "", tuple(turns), video_first=video_first)
