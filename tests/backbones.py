"""The published shapes of language models that people start from, as their config.json gives them, and their sizes."""

from __future__ import annotations

from typing import Any

from pite.architectures import ARCHITECTURES
from pite.config import PiTeConfig

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6}


def _shape(kind: str, layers: int, hidden: int, inner: int, heads: int, keys: int, vocabulary: int, **more: Any) -> Any:
    return kind, {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": keys, "vocab_size": vocabulary, "tie_word_embeddings": False, **more,
    }  # fmt: skip


_TIED = {"tie_word_embeddings": True}
_SHAPES = {
    "Llama-3.1-8B": _shape(
        "llama", 32, 4096, 14336, 32, 8, 128256, max_position_embeddings=131072, rope_parameters=_LLAMA3_ROPE
    ),
    "Llama-3.2-3B": _shape(
        "llama", 28, 3072, 8192, 24, 8, 128256, head_dim=128, max_position_embeddings=131072,
        rope_parameters={**_LLAMA3_ROPE, "factor": 32.0}, **_TIED,
    ),
    "Mistral-7B-v0.3": _shape("mistral", 32, 4096, 14336, 32, 8, 32768, sliding_window=None),
    "Qwen2.5-3B": _shape("qwen2", 36, 2048, 11008, 16, 2, 151936, rope_parameters=_QWEN_ROPE, **_TIED),
    "Qwen2.5-7B": _shape("qwen2", 28, 3584, 18944, 28, 4, 152064, rope_parameters=_QWEN_ROPE),
    "Qwen2.5-14B": _shape("qwen2", 48, 5120, 13824, 40, 8, 152064, rope_parameters=_QWEN_ROPE),
    "Qwen3-1.7B": _shape("qwen3", 28, 2048, 6144, 16, 8, 151936, head_dim=128, rope_parameters=_QWEN_ROPE, **_TIED),
    "Qwen3-4B": _shape("qwen3", 36, 2560, 9728, 32, 8, 151936, head_dim=128, rope_parameters=_QWEN_ROPE, **_TIED),
    "Qwen3-8B": _shape("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128, rope_parameters=_QWEN_ROPE),
    "Qwen3-14B": _shape("qwen3", 40, 5120, 17408, 40, 8, 151936, head_dim=128, rope_parameters=_QWEN_ROPE),
    "SmolLM2-1.7B": _shape("llama", 24, 2048, 8192, 32, 32, 49152, max_position_embeddings=8192, **_TIED),
}  # fmt: skip

BILLIONS = {
    "Llama-3.1-8B": 8.03, "Llama-3.2-3B": 3.21, "Mistral-7B-v0.3": 7.25, "Qwen2.5-3B": 3.09, "Qwen2.5-7B": 7.62,
    "Qwen2.5-14B": 14.77, "Qwen3-1.7B": 1.72, "Qwen3-4B": 4.02, "Qwen3-8B": 8.19, "Qwen3-14B": 14.77,
    "SmolLM2-1.7B": 1.71,
}  # fmt: skip
"""Parameters that the models' cards give, in 1e9; embeddings that are tied count once."""


def published_shape(name: str) -> PiTeConfig:
    """PiTe on the language model of that name; "7b" and "13b" are Vicuna's."""
    if name in ("7b", "13b"):
        return PiTeConfig.preset(name)  # type: ignore[arg-type]
    kind, settings = _SHAPES[name]
    return PiTeConfig(ARCHITECTURES[kind].config(**settings))
