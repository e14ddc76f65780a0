"""A PiTe model on disk, in two layouts.

whole   config.json + weights under published names (`model.vision_adapter.weight`, `model.layers.0...`): what
        `save_pretrained` writes, what the authors' code reads, and, without PiTe's own tensors, any Hugging Face Llama.
stage   what a training stage leaves: a PEFT adapter, `pite.safetensors` (adapter and heads) and `lineage.json`, which
        names the language model and the earlier stages' adapters that are merged underneath, with checksums.

Only safetensors, JSON and `torch.load(weights_only=True)` are read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dataloaders.files import sha256, write_atomically, write_tensors
from pite import hub, names
from pite.config import PiTeConfig

if TYPE_CHECKING:
    from pite.model import PiTe

SHARD_BYTES = 5 * 2**30
LINEAGE, HEADS_FILE, ADAPTER_FILE = "lineage.json", "pite.safetensors", "adapter_model.safetensors"


def resolve(path_or_name: str | Path) -> Path:
    """The local directory of a language model given by path or by Hugging Face name. Raises ValueError."""
    return hub.resolve(path_or_name, ("*.json", "tokenizer*"))


def load(directory: Path, *, dtype: torch.dtype, device: str = "cpu") -> PiTe:
    """Load either layout; a stage's own LoRA stays separate (trainable, exportable), earlier ones are merged.

    Raises ValueError naming the file and tensor when something is missing, of the wrong shape, or altered since the
    lineage was written.
    """
    if (directory / LINEAGE).exists():
        return _load_stage(directory, dtype, device)
    return load_language_model(directory, PiTeConfig.load(directory), dtype=dtype, device=device)


def load_language_model(
    directory: Path, config: PiTeConfig, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> PiTe:
    """Load a whole-layout or plain Llama directory; PiTe's tensors that it lacks are initialised, the same each time."""
    model = empty(config, dtype, device)
    initialize_heads(model, seed)
    copy_into(
        {**names.language_model_tensors(model), **names.head_tensors(model)},
        hub.weights(directory),
        directory,
        optional=names.HEADS,
    )
    return model


def random_model(config: PiTeConfig, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> PiTe:
    """A model of the right shape with random weights, for throughput runs and tests."""
    model = empty(config, dtype, device)
    initialize_heads(model, seed)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in names.language_model_tensors(model).items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        else:
            tensor.normal_(0, config.llm.initializer_range, generator=generator)
    return model


def empty(config: PiTeConfig, dtype: torch.dtype, device: str) -> PiTe:
    """An uninitialised model; on device "meta" it takes no memory at all."""
    from pite.model import PiTe

    with torch.device("meta"):
        model = PiTe(config, dtype)
    return model if device == "meta" else model.to_empty(device=device)


@torch.no_grad()
def initialize_heads(model: PiTe, seed: int) -> None:
    """Start adapter and heads, drawn on the CPU so that every device gets the same numbers.

    The adapter as `nn.Linear` starts; the coordinate heads near the centre of the frame, since AdamW takes
    0.5 / learning rate steps to carry a bias there from 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in names.HEADS:
        linear: nn.Linear = getattr(model, name)
        bound = 1 / math.sqrt(linear.in_features)
        for parameter in (linear.weight, linear.bias):
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    for head in (model.localization_projector, model.trajectory_projector):
        head.weight.mul_(0.1)
        head.bias.fill_(0.5)


def save_merged(model: PiTe, directory: Path) -> None:
    """Write the whole layout, LoRA merged into a copy of each weight; shards of at most 5 GiB, the index last."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    total = 0
    for name, tensor in {**names.merged_tensors(model), **names.head_tensors(model)}.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        beside = directory / f".{file}.tmp"
        write_tensors(beside, shard)
        beside.replace(directory / file)
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        write_atomically(directory / "model.safetensors.index.json", json.dumps(content, indent=1))
    model.config.save(directory)


def save_stage(model: PiTe, directory: Path, lineage: dict[str, Any]) -> None:
    """Write a stage's files into an existing directory: PEFT adapter, heads, config and lineage with checksums.

    lineage  {"stage", "language_model": directory or Hugging Face name, "merged": [directories of earlier stages, in
             order]} and whatever else should be remembered; paths are kept relative, checksums are added

    PEFT is told the base that the adapter was trained on: the language model, or the last stage merged into it.
    """
    from peft import LoraConfig

    _, linear, _ = next(names.linear_layers(model))
    assert linear.lora_b is not None, "a stage trains a LoRA"
    rank = linear.lora_b.shape[1]
    model.config.save(directory)
    write_tensors(directory / ADAPTER_FILE, names.lora_tensors(model))
    write_tensors(directory / HEADS_FILE, names.head_tensors(model))
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str((lineage["merged"] or [lineage["language_model"]])[-1]),
        r=rank,
        lora_alpha=linear.scale * rank,
        lora_dropout=0.0,
        target_modules=sorted(part.split(".")[1] for parts in names.PROJECTIONS.values() for part in parts),
        inference_mode=True,
    ).save_pretrained(str(directory))
    # The directory is renamed into place later, to a sibling: paths relative to its parent stay true.
    merged = [
        {"path": os.path.relpath(path, directory.parent), "sha256": sha256(Path(path) / ADAPTER_FILE)}
        for path in lineage["merged"]
    ]
    llm = lineage["language_model"]
    content = {
        **lineage,
        "language_model": os.path.relpath(llm, directory.parent) if Path(llm).is_dir() else llm,
        "merged": merged,
        "files": {file: sha256(directory / file) for file in (ADAPTER_FILE, HEADS_FILE)},
    }
    write_atomically(directory / LINEAGE, json.dumps(content, indent=1) + "\n")


def read_lineage(directory: Path) -> dict[str, Any]:
    """The lineage of a stage directory, its files checked against their checksums; its paths made absolute."""
    lineage = _parse_lineage(directory)
    for file, checksum in lineage["files"].items():
        check(directory / file, checksum)
    local = (directory.parent / lineage["language_model"]).resolve()
    if local.is_dir():
        lineage["language_model"] = str(local)
    for entry in lineage["merged"]:
        entry["path"] = str((directory.parent / entry["path"]).resolve())
        check(Path(entry["path"]) / ADAPTER_FILE, entry["sha256"])
    return lineage


def stages(directory: Path) -> tuple[int, ...]:
    """The stages whose learning a directory holds, in order, as the lineages say; none for the whole layout."""
    if not (directory / LINEAGE).exists():
        return ()
    lineage = _parse_lineage(directory)
    earlier = [_parse_lineage(directory.parent / entry["path"])["stage"] for entry in lineage["merged"]]
    return (*earlier, lineage["stage"])


def _parse_lineage(directory: Path) -> dict[str, Any]:
    try:
        lineage: dict[str, Any] = json.loads((directory / LINEAGE).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory / LINEAGE} cannot be read: {error}") from None
    return lineage


def check(file: Path, checksum: str) -> None:
    if not file.exists():
        raise ValueError(f"{file} is missing, though the lineage names it")
    if sha256(file) != checksum:
        raise ValueError(
            f"{file} was altered since the lineage was written: its SHA-256 is no longer {checksum[:12]}..."
        )


def _load_stage(directory: Path, dtype: torch.dtype, device: str) -> PiTe:
    lineage = read_lineage(directory)
    base = resolve(lineage["language_model"])
    model = load_language_model(base, PiTeConfig.load(directory), dtype=dtype, device=device)
    for entry in lineage["merged"]:
        load_lora(model, Path(entry["path"]))
        model.merge_lora()
    load_lora(model, directory)
    load_heads(model, directory)
    return model


def load_lora(model: PiTe, directory: Path) -> None:
    """Attach a PEFT adapter of plain LoRA on all seven projections. Raises ValueError for any other kind."""
    path = directory / "adapter_config.json"
    if not path.exists():
        raise ValueError(f"{directory} holds no adapter_config.json: it is no PEFT adapter")
    config = json.loads(path.read_text())
    for flag in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(flag):
            raise ValueError(f"{path}: {flag} is not supported, only plain LoRA is")
    model.add_lora(config["r"], config["lora_alpha"])
    copy_into(names.lora_tensors(model), hub.weights(directory, stem="adapter_model"), directory)


def load_heads(model: PiTe, directory: Path) -> None:
    copy_into(names.head_tensors(model), iter(load_file(directory / HEADS_FILE).items()), directory)


@torch.no_grad()
def copy_into(
    destinations: dict[str, Tensor], source: Iterator[tuple[str, Tensor]], where: Path, optional: tuple[str, ...] = ()
) -> None:
    """Copy named tensors into their views; `optional` names modules that may be absent, each as a whole."""
    missing = set(destinations)
    present = set()
    for name, tensor in source:
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in destinations):
            continue
        if name not in destinations:
            raise ValueError(f"{where}: unexpected tensor {name}")
        if tensor.shape != destinations[name].shape:
            expected = tuple(destinations[name].shape)
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, the configuration asks for {expected}")
        destinations[name].copy_(tensor)
        missing.discard(name)
        present.add(_module(name))
    missing = {name for name in missing if _module(name) not in optional or _module(name) in present}
    if missing:
        raise ValueError(f"{where}: {len(missing)} tensors are missing, {min(missing)} among them")


def _module(name: str) -> str:
    """`vision_adapter` of `model.vision_adapter.weight`."""
    return name.split(".")[-2]
