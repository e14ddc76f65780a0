"""The language-model architectures that the decoder computes: Llama's, and as data what each other one adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

LanguageModelConfig: TypeAlias = LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config
"""transformers' configuration of a language model that the decoder computes."""


@dataclass(frozen=True)
class Architecture:
    """One architecture, by the `model_type` of its config.json.

    config    transformers' configuration class; model: the name of its class with a vocabulary head
    qkv_bias  q, k and v have frozen biases
    qk_norm   each head of q and k is normalised before it is rotated, with frozen weights of `head_dim` numbers
    """

    name: str
    config: type[LanguageModelConfig]
    model: str
    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    "llama": Architecture("Llama", LlamaConfig, "LlamaForCausalLM"),
    "mistral": Architecture("Mistral", MistralConfig, "MistralForCausalLM"),
    "qwen2": Architecture("Qwen2", Qwen2Config, "Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Architecture("Qwen3", Qwen3Config, "Qwen3ForCausalLM", qk_norm=True),
}
"""Llama 1 to 3, Vicuna and SmolLM are "llama"; Qwen2.5 is "qwen2"."""
