"""Loads Vicuna with the authors' published PiTe adapters: a PEFT adapter for each stage, and PiTe's own tensors.

    STAGE/adapter_config.json, adapter_model.bin    plain LoRA; the stages are merged in order
    STAGE/vision_adapter.bin                        the adapter, keys that end in vision_adapter.weight and .bias
    STAGE/non_lora_trainables.bin                   any of PiTe's tensors, under the name that DeepSpeed saved

The last stage that holds a tensor gives its value, and non_lora_trainables has priority over vision_adapter, as in the
published inference code. There each merge is rounded to float16; here the sum of all updates is rounded once
(docs/training.md, "Merging and rounding"). All files are read with `torch.load(weights_only=True)`, or as safetensors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pite import hub, names
from pite.checkpoint import WeightLoader
from pite.config import PiTeConfig
from pite.families import PITE
from pite.model import PiTe

log = logging.getLogger(__name__)

HEADS = PITE.modules
_FILES = ("vision_adapter", "non_lora_trainables")


def load_published(llm: Path, stages: Sequence[Path], dtype: torch.dtype, device: str) -> PiTe:
    """The model of a Vicuna directory and the directories of the stages' adapters, in order.

    Raises ValueError (one sentence) for an adapter that is not plain LoRA or has another shape than the language model,
    and if no stage holds a vision adapter. Missing heads do not change the text; they are logged, since trajectories
    are then random.
    """
    model = WeightLoader(PiTeConfig.load(llm), llm, stages, dtype=dtype, device=device).model()
    tensors, found = names.head_tensors(model), _own_tensors(stages)
    if "model.vision_adapter.weight" not in found:
        raise ValueError(
            f"{' and '.join(map(str, stages))}: no folder holds vision_adapter.bin or non_lora_trainables.bin with a "
            "vision adapter: fetch all files of the published checkpoint"
        )
    names.compare(tensors, found, stages[-1], optional=HEADS)
    for name, tensor in found.items():
        tensors[name].copy_(tensor)
    if missing := [head for head in HEADS if f"model.{head}.weight" not in found]:
        log.warning("the published adapters hold no %s, so its predictions are random", " and no ".join(missing))
    return model


def _own_tensors(stages: Sequence[Path]) -> dict[str, Tensor]:
    """PiTe's own tensors under their published names."""
    found: dict[str, Tensor] = {}
    for stem in _FILES:
        for stage in stages:
            if hub.standard_files(stage, stem) or hub.standard_files(stage, stem, ".bin"):
                weights = hub.Weights(stage, stem)
                found |= {own: weights[name] for name in weights if (own := _own_name(name))}
    return found


def _own_name(saved: str) -> str | None:
    """`model.vision_adapter.weight` of any name that ends so; None for other tensors."""
    head, _, kind = ".".join(saved.split(".")[-2:]).partition(".")
    return f"model.{head}.{kind}" if head in HEADS and kind in ("weight", "bias") else None
