"""Writes the two export formats: merged weights (full), or one adapter (peft).

For a model of PG-Video-LLaVA the folder of merged weights is also what the published code takes as --model-name and
--projection_path: its projector is among the weights and in the published mm_projector.bin.

Both read files one tensor at a time and build no model. The updates of all stages are summed in float32:

full  W + sum of scale B A, rounded once to the requested dtype; host memory holds one shard and one tensor
peft  the stages' A are concatenated along the rank, and so are their B, each times its scale; alpha equals the rank, so
      PEFT's own scale is 1
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
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
from pite.families import ADDED_TOKENS
from pite.llava import EDGES, EMBEDDINGS, PROJECTOR_FILE, with_edges, write_projector
from pite.shards import sharded, write_index
from pite.tokenizers import load_tokenizer, tokenizer_files


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
        """Raises ValueError, like `pite.checkpoint.from_pretrained`, if files are missing or altered."""
        directory = checkpoint.resolve(path_or_name)
        config = PiTeConfig.load(directory)
        if (directory / lineage.LINEAGE).exists():
            made = lineage.read_lineage(directory)
            lineage.check_language_model(directory, made["language_model"])
            own = (directory,) if lineage.ADAPTER_FILE in made["files"] else ()
            adapters, base = (*(Path(entry["path"]) for entry in made["merged"]), *own), made["language_model"]
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
        weights = (
            hub.Weights(self.directory, "pite")
            if separate.exists()
            else checkpoint.read_weights(self.directory, self.config)
        )
        found = {name: weights[name] for name in expected if name in weights}
        if not found:
            raise ValueError(checkpoint.untrained(self.directory))
        names.compare(expected, found, self.directory)
        return found


def write_full(trained: TrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Write the merged language model and `pite.safetensors` into an existing directory, in transformers' format.

    A single file has an index too. Without an index, programs such as vLLM load every *.safetensors of a folder, and
    would treat PiTe's own tensors as the language model's. PG-Video-LLaVA's projector is among the weights, because the
    published code fills only what it finds there; transformers reports these tensors as unused.
    """
    base = checkpoint.resolve(trained.base)
    loader = checkpoint.WeightLoader(trained.config, base, trained.adapters, dtype=dtype)
    model = checkpoint.empty(trained.config, dtype, "meta")
    shapes, heads = names.language_model_tensors(model), trained.heads()
    if trained.config.choices.marks:
        shapes |= {name: tensor for name, tensor in names.head_tensors(model).items() if name != EDGES}
    shards = sharded(shapes, checkpoint.SHARD_BYTES)
    with tqdm(total=len(shapes), desc="weights", unit="tensor", file=sys.stderr) as bar:
        for file, shard in shards.items():
            write_tensors(directory / file, dict(_rounded(loader, shard, heads, dtype, bar)))
    write_index(hub.index_file(directory), shards)
    _write_common(trained, heads, base, directory, loader.weight(EMBEDDINGS).to(dtype))
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
    loader: checkpoint.WeightLoader,
    shard: dict[str, Tensor],
    heads: Mapping[str, Tensor],
    dtype: torch.dtype,
    bar: tqdm[Any],
) -> Iterator[tuple[str, Tensor]]:
    for name in shard:
        tensor = (heads[name] if name in heads else loader.weight(name)).to(dtype)
        tensor = with_edges(tensor, heads) if name == EMBEDDINGS else tensor
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} holds numbers that are not finite in {dtype}: give another --dtype, or check the base"
            )
        yield name, tensor
        bar.update()


def write_peft(trained: TrainedModel, directory: Path) -> None:
    """Write one plain LoRA for the original language model, and the other files of a stage's output.

    Raises ValueError without an adapter: for a whole model, whose updates are in its weights, and for a training without LoRA.
    """
    if not trained.adapters:
        raise ValueError(f"{trained.directory} holds no adapter: export it with --format full")
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
    base = checkpoint.resolve(trained.base)
    embeddings = checkpoint.read_weights(base, trained.config)[EMBEDDINGS]
    _write_common(trained, trained.heads(), base, directory, embeddings)
    rank = sum(adapter.rank for adapter in adapters)
    kept = {name: value for name, value in trained.stages[-1].items() if name in ("stage", "steps", "made_of")}
    record = {**kept, "language_model": trained.base, "merged": []}
    checkpoint.describe_stage(directory, record, rank, alpha=rank)


def _write_common(
    trained: TrainedModel, heads: Mapping[str, Tensor], base: Path, directory: Path, embeddings: Tensor
) -> None:
    write_tensors(directory / lineage.HEADS_FILE, heads)
    trained.config.save(directory)
    if not trained.config.choices.marks:
        load_tokenizer(trained.directory).save_pretrained(str(directory))
        return
    write_projector(directory / PROJECTOR_FILE, heads, embeddings)
    # The base's own files: the published code's transformers cannot read those that later versions write.
    for file in tokenizer_files(base):
        shutil.copyfile(file, directory / file.name)


def published_code_loads(directory: Path) -> bool:
    """Whether the published code, which adds the three tokens to the tokenizer of a folder, finds their rows in its tables."""
    config = PiTeConfig.load(directory)
    words = config.llm.vocab_size - ADDED_TOKENS
    has_sentencepiece = (directory / "tokenizer.model").exists()
    return config.choices.marks and has_sentencepiece and len(load_tokenizer(directory)) == words


def write_record(trained: TrainedModel, directory: Path, kind: str, dtype: str) -> None:
    """Write `export.json`: the format, and a summary of each stage. It contains no local path."""
    recorded = ("stage", "steps", "files", "made_of")
    stages = [{name: stage[name] for name in recorded if name in stage} for stage in trained.stages]
    content = {"format": kind, "dtype": dtype, "language_model": trained.hub_base, "stages": stages}
    write_atomically(directory / RECORD, json.dumps(content, indent=1) + "\n")
