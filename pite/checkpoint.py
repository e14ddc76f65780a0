"""A PiTe model on disk, in two layouts.

whole   config.json and weights under published names (`model.vision_adapter.weight`, `model.layers.0...`).
        `save_pretrained` writes it and the authors' code reads it. Without PiTe's own tensors it is a Hugging Face
        language model. `pite.export` writes PiTe's own tensors to a separate file, `pite.safetensors`.
stage   the output of a training stage: a PEFT adapter, `pite.safetensors` (adapter and heads) and `lineage.json`, which
        names the language model and the earlier stages' adapters that are merged into it, with checksums.

Only safetensors, JSON and `torch.load(weights_only=True)` are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dataloaders.files import (
    remove_abandoned,
    sha256,
    temporary_sibling,
    write_atomically,
    write_tensors,
)
from pite import hub, names
from pite.adapters import plain_lora
from pite.config import PiTeConfig
from pite.export import RECORD
from pite.families import PITE
from pite.lineage import ADAPTER_FILE, HEADS_FILE, LINEAGE, check_language_model, history, read_lineage
from pite.llava import (
    EDGES,
    EMBEDDINGS,
    PROJECTOR_FILE,
    VideoTokenWeights,
    is_trained,
    weight_files,
    with_edges,
    write_projector,
)
from pite.model import PiTe
from pite.shards import sharded, write_index

SHARD_BYTES = 5 * 2**30


def resolve(path_or_name: str | Path) -> Path:
    """Local directory of a language model or a PiTe model, from a path or a Hugging Face name. Raises ValueError."""
    files = ("*.json", "tokenizer*", "chat_template*", HEADS_FILE, ADAPTER_FILE, PROJECTOR_FILE)
    return hub.resolve(path_or_name, files)


def identity(directory: Path) -> str:
    """A checksum of the weights of a model: of its stages as recorded, or of its files without such a record."""
    stages = history(directory)
    sums = [json.dumps(stage["files"], sort_keys=True) for stage in stages] or [
        sha256(file) for file in weight_files(directory)
    ]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:12]


def from_pretrained(directory: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PiTe:
    """Load a stage's output, an export, a published-layout directory or a plain language model's.

    directory  a path, or a Hugging Face name such as that of a pushed export
    The stage's own LoRA stays separate (trainable, exportable); the LoRA of earlier stages is merged into the weights.
    Raises ValueError, naming the file and tensor, when something is missing, has the wrong shape, or was altered since
    the lineage was written.
    """
    path = resolve(directory)
    if (path / LINEAGE).exists():
        return _load_stage(path, dtype, device)
    return load_language_model(path, PiTeConfig.load(path), dtype=dtype, device=device)


def check_trained(directory: Path) -> None:
    """Raise ValueError for a language model without PiTe's adapter and heads, whose answers would be random.

    Reads the names of the tensors. Weights that cannot be read are left to what loads them.
    """
    if any((directory / file).exists() for file in (LINEAGE, HEADS_FILE)) or is_trained(directory):
        return
    try:
        weights = hub.Weights(directory)
    except ValueError:
        return
    if not any(f"model.{head}.weight" in weights for head in PITE.modules):
        raise ValueError(untrained(directory))


def untrained(directory: Path) -> str:
    """The message for a model that cannot be used for videos."""
    return f"{directory} holds a language model without PiTe's adapter and heads: train it first"


def load_language_model(
    directory: Path, config: PiTeConfig, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> PiTe:
    """Load a whole-layout directory or a plain language model. PiTe's tensors that it lacks are initialised from `seed`."""
    return WeightLoader(config, directory, dtype=dtype, device=device, seed=seed).model()


def random_model(config: PiTeConfig, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> PiTe:
    """A model of the right shape with random weights, for throughput runs and tests."""
    return WeightLoader(config, None, dtype=dtype, device=device, seed=seed).model()


def empty(config: PiTeConfig, dtype: torch.dtype, device: str) -> PiTe:
    """An uninitialised model; on device "meta" it takes no memory at all."""
    with torch.device("meta"):
        model = PiTe(config, dtype)
    return model if device == "meta" else model.to_empty(device=device)


class WeightLoader:
    """Fills a model one decoder layer at a time, from files or random numbers, with earlier stages merged in.

    llm     directory of a whole model or a plain language model; None for random weights, which have no earlier stages
    merged  directories of earlier stages' adapters, in order; a weight and all its updates are summed in float32 and
            rounded once to `dtype` (docs/training.md, "Merging and rounding")
    device  where each tensor is made; host memory holds one tensor at a time, plus mapped files
    The constructor compares all names and shapes. It raises ValueError, naming the directory and the tensor, when one
    does not fit.
    """

    def __init__(
        self,
        config: PiTeConfig,
        llm: Path | None,
        merged: Sequence[Path] = (),
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        assert llm is not None or not merged, "random weights have no earlier stages"
        self._config, self._dtype, self._device, self._seed = config, dtype, device, seed
        self._generator = torch.Generator(device).manual_seed(seed)
        self._llm, self._weights = llm, None if llm is None else read_weights(llm, config)
        if llm is not None and self._weights is not None:
            model = empty(config, dtype, "meta")
            expected = {**names.language_model_tensors(model), **names.head_tensors(model)}
            names.compare(expected, self._weights, llm, optional=config.choices.modules)
            _check_tied(config, self._weights, llm)
        self._adapters = [Adapter(directory, config) for directory in merged]

    def model(self) -> PiTe:
        """The complete model."""
        model = self.without_layers()
        for _ in self.layers(model):
            pass
        return model

    def without_layers(self) -> PiTe:
        """A model whose decoder layers are still on the meta device."""
        model = empty(self._config, self._dtype, "meta")
        for module in (model, model.decoder):
            module.to_empty(device=self._device, recurse=False)
        for module in (getattr(model, name) for name in self._config.choices.modules):
            if isinstance(module, nn.Module):
                module.to_empty(device=self._device)
        model.initialize_heads(self._seed)
        self._fill(names.outer_tensors(model))
        if self._weights is not None:
            self._fill({name: tensor for name, tensor in names.head_tensors(model).items() if name in self._weights})
        if self._llm is not None and (self._llm / HEADS_FILE).exists():
            load_heads(model, self._llm)
        return model

    def layers(self, model: PiTe) -> Iterator[int]:
        """Fill a model's decoder layers in order, lazily; yields the index of each layer once it is filled."""
        for i, layer in enumerate(model.decoder.layers):
            layer.to_empty(device=self._device)
            self._fill(names.layer_tensors(model, i))
            yield i

    def weight(self, name: str) -> Tensor:
        """One of the language model's tensors: as stored, or float32 if earlier stages have updates for it.

        Updates are added in order. Nothing is rounded to the model's dtype yet.
        """
        assert self._weights is not None
        updates = [adapter for adapter in self._adapters if adapter.touches(name)]
        if not updates:
            return self._weights[name]
        # Moved before the conversion, which would otherwise run on the host.
        total = self._weights[name].to(self._device).to(torch.float32, copy=True)
        for adapter in updates:
            total += adapter.update(name, self._device)
        return total

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._weights is not None:
                tensor.copy_(self.weight(name))
            elif name.endswith("norm.weight"):
                tensor.fill_(1)
            else:
                tensor.normal_(0, self._config.llm.initializer_range, generator=self._generator)


def save_pretrained(model: PiTe, directory: Path | str) -> None:
    """Write the whole layout under published names, with the LoRA merged into copies; shards of at most 5 GiB.

    Removes the weights and the index of an earlier model in the directory, however it was sharded. After a kill or a
    full disk the directory holds the complete earlier model, the complete new one, or no config.json; loading refuses
    the last. Raises ValueError for a directory that holds a training stage.
    """
    directory = Path(directory)
    if (directory / LINEAGE).exists():
        raise ValueError(f"{directory} holds a training stage's output: save the whole model into another directory")
    directory.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory, ".model*.safetensors.*.tmp")
    shards = sharded(_published(model), SHARD_BYTES)
    written = {file: temporary_sibling(directory / file) for file in shards}
    for file, shard in shards.items():
        write_tensors(written[file], shard)
    index = hub.index_file(directory)
    others = [directory / name for name in ("config.json", HEADS_FILE, RECORD)]
    for stale in (*others, index, *hub.standard_files(directory)):
        stale.unlink(missing_ok=True)
    for file, temporary in written.items():
        temporary.replace(directory / file)
    if len(shards) > 1:
        write_index(index, shards)
    model.config.save(directory)


def _published(model: PiTe) -> dict[str, Tensor]:
    """All tensors under published names, where the embeddings of a video's marks are rows of the table."""
    tensors = {**names.merged_tensors(model), **names.head_tensors(model)}
    if model.config.choices.marks:
        tensors[EMBEDDINGS] = with_edges(tensors[EMBEDDINGS], tensors)
        del tensors[EDGES]
    return tensors


def save_stage(model: PiTe, directory: Path, lineage: dict[str, Any]) -> None:
    """Write a stage's files into an existing directory: PEFT adapter, heads, config and lineage with checksums.

    lineage  {"stage", "language_model": directory or Hugging Face name, "merged": [directories of earlier stages, in
             order]} and any further fields to record; paths are stored relative, checksums are added

    The base model in PEFT's configuration is what the adapter was trained on: the language model, or the last stage
    merged into it.
    """
    _, linear, _ = next(names.linear_layers(model))
    rank = 0 if linear.lora_b is None else linear.lora_b.shape[1]
    model.config.save(directory)
    if rank:
        write_tensors(directory / ADAPTER_FILE, names.lora_tensors(model))
    write_tensors(directory / HEADS_FILE, names.head_tensors(model))
    describe_stage(directory, lineage, rank, linear.scale * rank)


def describe_stage(directory: Path, lineage: dict[str, Any], rank: int, alpha: float) -> None:
    """Write PEFT's configuration and the lineage (see `save_stage`) next to an adapter and heads; rank 0: no adapter."""
    if rank:
        _describe_adapter(directory, lineage, rank, alpha)
    # The directory is later renamed to a sibling: paths relative to its parent stay valid.
    merged = [
        {"path": _relative(path, directory.parent), "sha256": sha256(Path(path) / ADAPTER_FILE)}
        for path in lineage["merged"]
    ]
    llm, files = lineage["language_model"], (ADAPTER_FILE, HEADS_FILE) if rank else (HEADS_FILE,)
    content = {
        **lineage,
        "language_model": _relative(llm, directory.parent) if Path(llm).is_dir() else llm,
        "merged": merged,
        "files": {file: sha256(directory / file) for file in files},
    }
    write_atomically(directory / LINEAGE, json.dumps(content, indent=1) + "\n")


def _describe_adapter(directory: Path, lineage: dict[str, Any], rank: int, alpha: float) -> None:
    from peft import LoraConfig

    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str((lineage["merged"] or [lineage["language_model"]])[-1]),
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=sorted(part.split(".")[1] for parts in names.PROJECTIONS.values() for part in parts),
        inference_mode=True,
    ).save_pretrained(str(directory))


def _relative(path: str | Path, start: Path) -> str:
    """`path` relative to `start`, both with symbolic links resolved: `..` leaves a link's target, not the link."""
    return os.path.relpath(Path(path).resolve(), start.resolve())


def _load_stage(directory: Path, dtype: torch.dtype, device: str) -> PiTe:
    lineage = read_lineage(directory)
    check_language_model(directory, lineage["language_model"])
    base = resolve(lineage["language_model"])
    merged = [Path(entry["path"]) for entry in lineage["merged"]]
    model = WeightLoader(PiTeConfig.load(directory), base, merged, dtype=dtype, device=device).model()
    if ADAPTER_FILE in lineage["files"]:
        load_lora(model, directory)
    load_heads(model, directory)
    return model


def save_projector(model: PiTe, base: Path, file: Path) -> None:
    """Write the published mm_projector.bin of a model between two marks, trained on the language model in `base`."""
    embeddings = read_weights(base, model.config)[EMBEDDINGS]
    write_projector(file, names.head_tensors(model), embeddings)


class Adapter:
    """A PEFT adapter of plain LoRA on all seven projections. Raises ValueError for any other kind."""

    def __init__(self, directory: Path, config: PiTeConfig) -> None:
        self.rank, self._alpha = plain_lora(directory, config.llm.num_hidden_layers)
        self._weights = hub.Weights(directory, stem="adapter_model")
        model = empty(config, torch.float32, "meta")
        model.add_lora(self.rank, self._alpha)
        names.compare(names.lora_tensors(model), self._weights, directory)

    def attach(self, model: PiTe, i: int) -> None:
        """Add the adapter's LoRA to decoder layer i."""
        for _, linear, _ in names.linear_layers(model, i):
            linear.add_lora(self.rank, self._alpha, torch.Generator())
        for name, tensor in names.lora_tensors(model, i).items():
            tensor.copy_(self._weights[name])

    def touches(self, name: str) -> bool:
        """Whether the adapter has an update for the language model's tensor `name`."""
        return names.lora_name(name, "A") in self._weights

    def factors(self, name: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the language model's tensor `name`, float32; its update is scale * B A."""
        a, b = (self._weights[names.lora_name(name, half)].to(device).float() for half in "AB")
        return a, b

    def update(self, name: str, device: str) -> Tensor:
        """What the adapter adds to the language model's tensor `name` (out, in), float32."""
        a, b = self.factors(name, device)
        return (b @ a).mul_(self.scale)

    @property
    def scale(self) -> float:
        return self._alpha / self.rank


def load_lora(model: PiTe, directory: Path) -> None:
    """Attach a PEFT adapter of plain LoRA on all seven projections. Raises ValueError for any other kind."""
    adapter = Adapter(directory, model.config)
    for i in range(len(model.decoder.layers)):
        adapter.attach(model, i)


def load_heads(model: PiTe, directory: Path) -> None:
    """Copy a stage's adapter and heads into a model. Raises ValueError when names or shapes differ."""
    tensors, found = names.head_tensors(model), load_file(directory / HEADS_FILE)
    names.compare(tensors, found, directory)
    for name, tensor in tensors.items():
        tensor.copy_(found[name])


def read_weights(directory: Path, config: PiTeConfig) -> Mapping[str, Tensor]:
    """The tensors of a whole-layout directory or a language model by their names, read lazily; those of `pite.llava` for a
    model between two marks."""
    weights = hub.Weights(directory)
    return VideoTokenWeights(directory, weights, config.llm.vocab_size) if config.choices.marks else weights


def _check_tied(config: PiTeConfig, weights: Mapping[str, Tensor], where: Path) -> None:
    """Raise ValueError if embedding and vocabulary head are declared tied, but are two different tensors."""
    both = ("model.embed_tokens.weight", "lm_head.weight")
    if not config.llm.tie_word_embeddings or any(name not in weights for name in both):
        return
    if not torch.equal(*(weights[name] for name in both)):
        raise ValueError(
            f"{where}: tie_word_embeddings is set, but lm_head.weight is not the embedding: set it to false in "
            "config.json, or remove the tensor"
        )
