"""Writes the two export formats: merged weights (full), or one adapter (peft).

Both read files one tensor at a time and build no model. The updates of all stages are summed in float32:

full  W + sum of scale B A, rounded once to the requested dtype; host memory holds one shard and one tensor
peft  the stages' A are concatenated along the rank, and so are their B, each times its scale; alpha equals the rank, so
      PEFT's own scale is 1
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dataloaders.files import read_json_object, write_atomically, write_tensors
from dataloaders.samples.layouts import VICUNA, end_ids, layout_of
from pite import checkpoint, hub, lineage, names
from pite.config import PiTeConfig
from pite.export import RECORD
from pite.shards import sharded, write_index
from pite.tokenizers import load_tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """A trained PiTe model on disk.

    directory       a stage's output, an earlier export, or a whole model
    base            path or Hugging Face name of the weights that the adapters update; a whole model's own directory
    adapters        directories of the stages' adapters, in order; none for a whole model
    stages          the record of each stage, in order: a run's lineages; none for the published layout
    language_model  path or Hugging Face name of the model that the first stage started from; None if not recorded
    """

    directory: Path
    config: PiTeConfig
    base: str
    adapters: tuple[Path, ...]
    stages: tuple[dict[str, Any], ...]
    language_model: str | None

    @staticmethod
    def open(path_or_name: str | Path) -> TrainedModel:
        """Raises ValueError, like `pite.checkpoint.from_pretrained`, if files are missing or altered, and for another family."""
        directory = checkpoint.resolve(path_or_name)
        config = PiTeConfig.load(directory)
        if config.family != "pite":
            raise ValueError(
                f"{directory} is a model of the family {config.family}, which pite.export does not write: its folder holds the "
                "published mm_projector.bin already"
            )
        if (directory / lineage.LINEAGE).exists():
            made = lineage.read_lineage(directory)
            lineage.check_language_model(directory, made["language_model"])
            adapters = (*(Path(entry["path"]) for entry in made["merged"]), directory)
            base = made["language_model"]
            return TrainedModel(directory, config, base, adapters, tuple(lineage.history(directory)), base)
        export = directory / RECORD
        language_model = read_json_object(export).get("language_model") if export.exists() else None
        return TrainedModel(directory, config, str(directory), (), tuple(lineage.history(directory)), language_model)

    @property
    def hub_base(self) -> str | None:
        """The language model's Hugging Face name; None if it was given as a path or is not recorded."""
        local = self.language_model is None or Path(self.language_model).is_absolute()
        return None if local else self.language_model

    def heads(self) -> dict[str, Tensor]:
        """Adapter and heads under published names. Raises ValueError if there are none or they do not fit."""
        expected = names.head_tensors(checkpoint.empty(self.config, torch.float32, "meta"))
        separate = self.directory / lineage.HEADS_FILE
        weights = hub.Weights(self.directory, "pite") if separate.exists() else hub.Weights(self.directory)
        found = {name: weights[name] for name in expected if name in weights}
        if not found:
            raise ValueError(checkpoint.untrained(self.directory))
        names.compare(expected, found, self.directory)
        return found


def write_full(trained: TrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Write the merged language model and `pite.safetensors` into an existing directory, in transformers' format.

    A single file has an index too. Without an index, programs such as vLLM load every *.safetensors of a folder, and
    would treat PiTe's own tensors as the language model's.
    """
    base = checkpoint.resolve(trained.base)
    loader = checkpoint.WeightLoader(trained.config, base, trained.adapters, dtype=dtype)
    shapes = names.language_model_tensors(checkpoint.empty(trained.config, dtype, "meta"))
    shards = sharded(shapes, checkpoint.SHARD_BYTES)
    with tqdm(total=len(shapes), desc="weights", unit="tensor", file=sys.stderr) as bar:
        for file, shard in shards.items():
            write_tensors(directory / file, dict(_rounded(loader, shard, dtype, bar)))
    write_index(hub.index_file(directory), shards)
    _write_common(trained, directory)
    config = read_json_object(directory / "config.json")
    name = str(dtype).removeprefix("torch.")
    # Both fields for the dtype: transformers 5 renamed torch_dtype to dtype.
    config |= {"architectures": [trained.config.architecture.model], "dtype": name, "torch_dtype": name}
    if (config.get("pad_token_id") or 0) >= config["vocab_size"]:
        config["pad_token_id"] = None  # transformers refuses one without an embedding, and nothing is padded with it
    write_atomically(directory / "config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")
    _write_generation_config(base, directory)


def _write_generation_config(base: Path, directory: Path) -> None:
    """The base's settings. With a chat template generation ends at the template's end of an answer, too, as ours does."""
    path, tokenizer = base / "generation_config.json", load_tokenizer(directory)
    if layout_of(tokenizer) is VICUNA:
        if path.exists():
            shutil.copyfile(path, directory / path.name)
        return
    values = read_json_object(path) if path.exists() else {}
    values["eos_token_id"] = list(end_ids(tokenizer))
    write_atomically(directory / "generation_config.json", json.dumps(values, indent=1, sort_keys=True) + "\n")


def _rounded(
    loader: checkpoint.WeightLoader, shard: dict[str, Tensor], dtype: torch.dtype, bar: tqdm[Any]
) -> Iterator[tuple[str, Tensor]]:
    for name in shard:
        tensor = loader.weight(name).to(dtype)
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} holds numbers that are not finite in {dtype}: give another --dtype, or check the base"
            )
        yield name, tensor
        bar.update()


def write_peft(trained: TrainedModel, directory: Path) -> None:
    """Write one plain LoRA for the original language model, and the other files of a stage's output.

    Raises ValueError for a whole model, because its updates are already in its weights.
    """
    if not trained.adapters:
        raise ValueError(f"{trained.directory} holds merged weights and no adapter: export it with --format full")
    adapters = [checkpoint.Adapter(path, trained.config) for path in trained.adapters]
    weights = names.language_model_tensors(checkpoint.empty(trained.config, torch.float32, "meta"))
    stacked: dict[str, Tensor] = {}
    for name in weights:
        if adapters[0].touches(name):
            factors = [adapter.factors(name) for adapter in adapters]
            stacked[names.lora_name(name, "A")] = torch.cat([a for a, _ in factors])
            scaled = [adapter.scale * b for adapter, (_, b) in zip(adapters, factors)]
            stacked[names.lora_name(name, "B")] = torch.cat(scaled, dim=1)
    write_tensors(directory / lineage.ADAPTER_FILE, stacked)
    _write_common(trained, directory)
    rank = sum(adapter.rank for adapter in adapters)
    kept = {name: value for name, value in trained.stages[-1].items() if name in ("stage", "steps", "made_of")}
    record = {**kept, "language_model": trained.base, "merged": []}
    checkpoint.describe_stage(directory, record, rank, alpha=rank)


def _write_common(trained: TrainedModel, directory: Path) -> None:
    write_tensors(directory / lineage.HEADS_FILE, trained.heads())
    trained.config.save(directory)
    load_tokenizer(trained.directory).save_pretrained(str(directory))


def write_record(trained: TrainedModel, directory: Path, kind: str, dtype: str) -> None:
    """Write `export.json`: the format, and a summary of each stage. It contains no local path."""
    recorded = ("stage", "steps", "files", "made_of")
    stages = [{name: stage[name] for name in recorded if name in stage} for stage in trained.stages]
    content = {"format": kind, "dtype": dtype, "language_model": trained.hub_base, "stages": stages}
    write_atomically(directory / RECORD, json.dumps(content, indent=1) + "\n")
