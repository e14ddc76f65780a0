"""Which PEFT adapters can be loaded: plain LoRA, and nothing that changes the arithmetic in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataloaders.files import read_json_object

CONFIG = "adapter_config.json"

_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "layers_pattern", "runtime_config"),
    # Settings of initialisations and variants that other fields switch on.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
}
"""Fields of PEFT's LoraConfig that are read here, or that leave the result of a trained adapter as it is."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Those that leave the base weights as they are; pissa, olora, corda, loftq and lora_ga change them.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def plain_lora(directory: Path, layers: int) -> tuple[int, float]:
    """Rank and alpha of the PEFT adapter in a directory, for a model of so many decoder layers.

    Raises ValueError naming the file and the field for every kind but plain LoRA: a field that changes the arithmetic
    and is not neutral is refused, and so is one that is not in PEFT's LoraConfig of today unless it is null or empty.
    """
    path = directory / CONFIG
    if not path.exists():
        raise ValueError(f"{directory} holds no {CONFIG}: it is no PEFT adapter")
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
