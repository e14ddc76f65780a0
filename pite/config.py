"""Shape of a PiTe model: its language model's configuration and three numbers of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import LlamaConfig

from dataloaders.errors import reason
from dataloaders.files import read_json_object, write_atomically

PRESETS: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""Vicuna v1.5's two sizes. All other settings are Llama 2's (see `PiTeConfig.preset`)."""


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
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if (fault := next(_unlike_llama(self.llm), None)) is not None:
            raise ValueError(fault)

    @property
    def head_dim(self) -> int:
        return self.llm.head_dim or self.llm.hidden_size // self.llm.num_attention_heads

    @property
    def context_length(self) -> int:
        """Number of positions that the language model was trained on, from its configuration."""
        rope, length = self.llm.rope_parameters, int(self.llm.max_position_embeddings)
        if rope["rope_type"] == "linear":  # such as Vicuna v1.5-16k, which gives the length before the scaling
            return int(length * rope["factor"])
        return max(length, int((rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 1)))

    def beyond_context(self, length: int) -> str | None:
        """A warning if a sequence of `length` tokens is longer than the context, else None."""
        if length <= self.context_length:
            return None
        return (
            f"a sequence of {length:,} tokens is longer than the {self.context_length:,} positions that the language "
            "model was trained on (max_position_embeddings), and its output beyond them is unreliable"
        )

    @property
    def arithmetic(self) -> dict[str, Any]:
        """The settings that, together with the weights, determine what the language model computes."""
        llm = self.llm
        return {
            "attention_heads": [llm.num_attention_heads, llm.num_key_value_heads, self.head_dim],
            "norm_epsilon": llm.rms_norm_eps,
            "rotary_embedding": dict(sorted(llm.rope_parameters.items())),
            "tied_embeddings": llm.tie_word_embeddings,
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
        """Read DIRECTORY/config.json of a PiTe model, or of a plain Llama; PiTe's own numbers default as above.

        Raises ValueError, naming the file, for any other configuration and for settings that the decoder does not
        support.
        """
        path = directory / "config.json"
        if not path.exists():
            raise ValueError(f"{directory} holds no config.json: it is not a Hugging Face model directory")
        values = read_json_object(path)
        if values.get("model_type", "llama") not in ("llama", "pite"):
            raise ValueError(f"{path}: model_type {values['model_type']!r} is not of the Llama architecture")
        values.pop("model_type", None)
        numbers = ("num_frames", "num_points", "vision_feature_size")
        own: dict[str, Any] = {name: values.pop(name) for name in numbers if name in values} | overrides
        try:
            llm = LlamaConfig(**values)
        except Exception as error:  # a wrong value makes transformers and its validators raise any exception
            raise ValueError(f"{path} is not a valid Llama configuration: {reason(error)}") from None
        try:
            return PiTeConfig(llm, **own)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, directory: Path) -> None:
        """Write DIRECTORY/config.json in the form that `load` and the published code read."""
        values = {
            **json.loads(self.llm.to_json_string(use_diff=False)),
            # transformers 4, which the published code uses, reads the rotary embedding's base here.
            "rope_theta": self.llm.rope_parameters["rope_theta"],
            "num_frames": self.num_frames,
            "num_points": self.num_points,
            "vision_feature_size": self.vision_feature_size,
        }
        write_atomically(directory / "config.json", json.dumps(values, indent=1, sort_keys=True) + "\n")


def _unlike_llama(llm: LlamaConfig) -> Iterator[str]:
    """Yield one sentence for each setting that changes the computation and that the decoder does not support.

    Two settings are accepted: `pretraining_tp` splits a product into summands, and `attention_dropout` acts in training
    only.
    """
    if llm.hidden_act not in ("silu", "swish"):
        yield f"hidden_act {llm.hidden_act!r} is not supported: the decoder computes SwiGLU, whose activation is 'silu'"
    if llm.attention_bias or llm.mlp_bias:
        yield "language models with attention or MLP biases are not supported: Llama has none"
    rope = llm.rope_parameters
    if (kind := rope["rope_type"]) in ("dynamic", "longrope"):
        yield (
            f"rotary embeddings of type {kind!r} are not supported: their frequencies depend on the longest sequence "
            "of a batch, so a sample's loss would depend on the other samples"
        )
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1):
        yield f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported: Llama rotates whole heads"
    extra = vars(llm)
    if extra.get("quantization_config"):
        yield "it has a quantization_config, and quantized weights are not supported: give the unquantized model"
    windows = ["attention_chunk_size", *["sliding_window"] * bool(extra.get("use_sliding_window", True))]
    for name in windows:
        if extra.get(name):
            yield (
                f"{name} {extra[name]} is not supported: attention is over the whole sequence; set it to null if the "
                "model was trained without it"
            )
    if set(extra.get("layer_types") or ()) - {"full_attention"}:
        yield "layer_types other than full_attention are not supported: attention is over the whole sequence"
    if llm.num_attention_heads % llm.num_key_value_heads:
        yield f"{llm.num_attention_heads} attention heads cannot share {llm.num_key_value_heads} key and value heads"
