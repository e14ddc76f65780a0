"""Checks a PEFT adapter's configuration: only plain LoRA is supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataloaders.files import read_json_object

CONFIG = "adapter_config.json"

_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "layers_pattern", "runtime_config"),
    # Settings of initialisations and variants that other fields enable.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
}
"""Fields of PEFT's LoraConfig that are read here, or that do not change what a trained adapter computes."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # These do not change the base weights; pissa, olora, corda, loftq and lora_ga do.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def plain_lora(directory: Path, layers: int) -> tuple[int, float]:
    """Rank and alpha of the PEFT adapter in a directory, for a model with `layers` decoder layers.

    Raises ValueError, naming the file and the field, for anything but plain LoRA. A field that changes the arithmetic
    must have its neutral value. A field that this version of PEFT's LoraConfig does not have must be null or empty.
    """
    path = directory / CONFIG
    if not path.exists():
        raise ValueError(f"{directory} has no {CONFIG}: it is not a PEFT adapter")
    given = read_json_object(path)
    for name, value in given.items():
        if name not in _WITHOUT_EFFECT and not _is_neutral(name, value, layers):
            raise ValueError(f"{path}: {name} {value!r} is not supported, only plain LoRA is{_remedy(name, value)}")
    rank: Any = given.get("r")
    alpha: Any = given.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r must be a whole number of at least 1, not {rank!r}")
    if type(alpha) not in (int, float):
        raise ValueError(f"{path}: lora_alpha must be a number, not {alpha!r}")
    return rank, alpha


def _is_neutral(name: str, value: Any, layers: int) -> bool:
    if name in _NEUTRAL:
        return any(value is neutral or (value == neutral and isinstance(value, str)) for neutral in _NEUTRAL[name])
    if name == "layers_to_transform":
        return value is None or value == [] or value == [*range(layers)]
    return value in (None, False, "", [], {})


def _remedy(name: str, value: Any) -> str:
    if name == "init_lora_weights":
        return (
            f"; an adapter that starts from {value!r} may change the base weights: convert it to plain LoRA by PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion"
        )
    return ""
