"""A PiTe model's shape: that of its language model plus four numbers of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import LlamaConfig

PRESETS: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""Vicuna v1.5's two sizes; everything else they share is Llama 2's (see `PiTeConfig.preset`)."""


@dataclass(frozen=True)
class PiTeConfig:
    """Shape of a PiTe model (paper section 4.1).

    llm                  transformers' configuration of the Llama-architecture language model
    num_frames           N, frames per video and so trajectory length
    num_points           P, key points per object
    vision_feature_size  channels of a frame feature (CLIP ViT-L/14 image embedding: 768)
    """

    llm: LlamaConfig
    num_frames: int = 100
    num_points: int = 3
    vision_feature_size: int = 768

    def __post_init__(self) -> None:
        for name in ("num_frames", "num_points", "vision_feature_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.llm.attention_bias or self.llm.mlp_bias:
            raise ValueError("language models with attention or MLP biases are not supported: Llama has none")
        if (kind := self.llm.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
            raise ValueError(
                f"rotary embeddings of type {kind!r} are not supported: their frequencies depend on the longest sequence "
                "of a batch, so that a sample's loss would depend on its company"
            )

    @property
    def head_dim(self) -> int:
        return self.llm.head_dim or self.llm.hidden_size // self.llm.num_attention_heads

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What decides, beside the weights, what the language model computes."""
        llm = self.llm
        return {
            "attention heads": [llm.num_attention_heads, llm.num_key_value_heads, self.head_dim],
            "norm epsilon": llm.rms_norm_eps,
            "rotary embedding": dict(sorted(llm.rope_parameters.items())),
            "tied embeddings": llm.tie_word_embeddings,
        }

    @staticmethod
    def preset(size: Literal["7b", "13b"]) -> PiTeConfig:
        """The paper's model on Vicuna v1.5 of the given size."""
        return PiTeConfig(
            LlamaConfig(
                **PRESETS[size],
                num_key_value_heads=PRESETS[size]["num_attention_heads"],
                vocab_size=32000,
                max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            )
        )

    @staticmethod
    def load(directory: Path, **overrides: int) -> PiTeConfig:
        """Read DIRECTORY/config.json: a PiTe model's, or a plain Llama's with PiTe's own numbers at their defaults."""
        path = directory / "config.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{directory} holds no config.json: it is no Hugging Face model directory") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if values.get("model_type", "llama") not in ("llama", "pite"):
            raise ValueError(f"{path}: model_type {values['model_type']!r} is not of the Llama architecture")
        values.pop("model_type", None)
        own = {name: values.pop(name) for name in ("num_frames", "num_points", "vision_feature_size") if name in values}
        return PiTeConfig(LlamaConfig(**values), **{**own, **overrides})

    def save(self, directory: Path) -> None:
        """Write DIRECTORY/config.json in the form that `load` and the published code read."""
        values = {
            **json.loads(self.llm.to_json_string(use_diff=False)),
            # transformers 4, which the published code runs on, reads the base of the rotary embedding here.
            "rope_theta": self.llm.rope_parameters["rope_theta"],
            "num_frames": self.num_frames,
            "num_points": self.num_points,
            "vision_feature_size": self.vision_feature_size,
        }
        (directory / "config.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
