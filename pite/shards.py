"""Splits weights into safetensors shards with Hugging Face's file names, and writes their index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dataloaders.files import write_atomically


def sharded(tensors: Mapping[str, Tensor], most: int) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, in order: shards of at most `most` bytes; a larger tensor has a shard of its own.

    Tensors may be on the meta device.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > most and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def write_index(path: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the index of the shards that `sharded` returned."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    write_atomically(path, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
