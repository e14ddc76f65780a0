"""Maps every published or PEFT tensor name to a view into the packed model's parameters.

The decoder fuses q,k,v and gate,up into one weight each; Hugging Face, PEFT and the published PiTe code have separate
weights. Only this module converts between the two. Loading copies into the views, saving copies out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from pite.decoder import DecoderLayer, LoRALinear
from pite.model import PiTe

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Fused layer of the decoder -> Hugging Face's modules, in stacking order."""


def linear_layers(model: PiTe, only: int | None = None) -> Iterator[tuple[str, LoRALinear, tuple[str, ...]]]:
    """Every fused linear layer, or those of decoder layer `only`: (prefix `model.layers.3.`, layer, parts' names)."""
    for i, layer in enumerate(model.decoder.layers):
        if only in (None, i):
            for attribute, parts in PROJECTIONS.items():
                yield f"model.layers.{i}.", getattr(layer, attribute), parts


def values(parameter: nn.Parameter) -> Tensor:
    return parameter.data


def language_model_tensors(model: PiTe, of: Callable[[nn.Parameter], Tensor] = values) -> dict[str, Tensor]:
    """Hugging Face names of a language model -> views of the weights (or of what `of` returns for them), without a LoRA.

    Raises ValueError for a model with float8 weights, because the unrounded values are lost.
    """
    if any(linear.quantized for _, linear, _ in linear_layers(model)):
        raise ValueError("this model's frozen weights are float8, for training only: load the model again to save them")
    tensors = outer_tensors(model, of)
    for i in range(len(model.decoder.layers)):
        tensors |= layer_tensors(model, i, of)
    return tensors


def outer_tensors(model: PiTe, of: Callable[[nn.Parameter], Tensor] = values) -> dict[str, Tensor]:
    """The part of `language_model_tensors` outside the decoder layers."""
    outer = {"model.embed_tokens.weight": model.decoder.embed_tokens, "model.norm.weight": model.decoder.norm}
    if model.lm_head is not None:
        outer["lm_head.weight"] = model.lm_head
    return {name: of(parameter) for name, parameter in outer.items()}


def layer_tensors(model: PiTe, i: int, of: Callable[[nn.Parameter], Tensor] = values) -> dict[str, Tensor]:
    """The part of `language_model_tensors` in decoder layer i."""
    layer = cast("DecoderLayer", model.decoder.layers[i])
    tensors = {
        f"model.layers.{i}.input_layernorm.weight": of(layer.input_norm),
        f"model.layers.{i}.post_attention_layernorm.weight": of(layer.post_attention_norm),
    }
    for name, norm in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
        if norm is not None:
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = of(norm)
    for prefix, linear, parts in linear_layers(model, i):
        for kind, parameter in (("weight", linear.weight), ("bias", linear.bias)):
            if parameter is not None:
                views = of(parameter).split(linear.splits)
                tensors |= {f"{prefix}{name}.{kind}": view for name, view in zip(parts, views)}
    return tensors


def head_tensors(model: PiTe, of: Callable[[nn.Parameter], Tensor] = values) -> dict[str, Tensor]:
    """Published names -> the parameters of the family's own modules (or what `of` returns for them)."""
    own = model.config.choices.modules
    return {f"model.{name}": of(p) for module in own for name, p in model.named_parameters() if _within(name, module)}


@torch.no_grad()
def merged_tensors(model: PiTe) -> dict[str, Tensor]:
    """Hugging Face names -> weights with the LoRA merged; weights that have a LoRA are copies, the others are views."""
    tensors = language_model_tensors(model)
    for prefix, linear, parts in linear_layers(model):
        if linear.lora_a is not None:
            for name, part in zip(parts, linear.merged().split(linear.splits)):
                tensors[f"{prefix}{name}.weight"] = part
    return tensors


def lora_name(weight: str, half: str) -> str:
    """PEFT's name of a weight's A (r, in) or B (out, r): `half` is "A" or "B"."""
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{half}.weight"


def lora_tensors(model: PiTe, only: int | None = None) -> dict[str, Tensor]:
    """PEFT names -> views of the LoRA matrices A (r, in) and B (out, r), of all layers or one; empty without a LoRA."""
    tensors: dict[str, Tensor] = {}
    for prefix, linear, parts in linear_layers(model, only):
        if linear.lora_a is None or linear.lora_b is None:
            continue
        halves = zip(parts, linear.lora_a.data.chunk(len(parts)), linear.lora_b.data.split(linear.splits))
        for name, a, b in halves:
            tensors[lora_name(f"{prefix}{name}.weight", "A")] = a
            tensors[lora_name(f"{prefix}{name}.weight", "B")] = b
    return tensors


def compare(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path, optional: tuple[str, ...] = ()
) -> None:
    """Raise ValueError unless names and shapes agree. A module in `optional` may be absent, but only completely."""
    for name, tensor in found.items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in expected):
            continue
        if name not in expected:
            raise ValueError(f"{where}: unexpected tensor {name}")
        if tensor.shape != expected[name].shape:
            shape = tuple(expected[name].shape)
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, the configuration requires {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name} has dtype {tensor.dtype}: quantized weights are not supported")
    present = {_module(name) for name in found}
    missing = {n for n in expected if n not in found and (_module(n) not in optional or _module(n) in present)}
    if missing:
        raise ValueError(f"{where}: {len(missing)} tensors are missing, among them {min(missing)}")


def _module(name: str) -> str:
    """`vision_adapter` of `model.vision_adapter.weight`."""
    return name.split(".")[1]


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
