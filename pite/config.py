"""Shape of a PiTe model: its language model's configuration and three numbers of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import LlamaConfig

from dataloaders.errors import reason
from dataloaders.files import read_json_object, write_atomically
from dataloaders.records import VideoFirst
from dataloaders.samples.marked import Marks
from pite.architectures import ARCHITECTURES, Architecture, LanguageModelConfig
from pite.families import Family, Name, family
from pite.llava import MODEL_TYPES, own_numbers, published_settings

PRESETS: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""Vicuna v1.5's two sizes. All other settings are Llama 2's (see `PiTeConfig.preset`)."""


@dataclass(frozen=True)
class PiTeConfig:
    """Shape of a PiTe model (paper section 4.1).

    llm                  transformers' configuration of the language model (`pite.architectures`)
    num_frames           N, frames per video and so trajectory length
    num_points           P, key points per object
    vision_feature_size  channels of a feature (CLIP ViT-L/14 image embedding: 768)
    family               name of its family (`pite.families`)
    num_places           rows of a video's record after those of its frames: one for each place in the frame; PiTe has none
    """

    llm: LanguageModelConfig
    num_frames: int = 100
    num_points: int = 3
    vision_feature_size: int = 768
    family: Name = "pite"
    num_places: int = 0

    def __post_init__(self) -> None:
        for name in ("num_frames", "num_points", "vision_feature_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.family not in get_args(Name):
            raise ValueError(f"family must be {' or '.join(get_args(Name))}, not {self.family!r}")
        if type(self.num_places) is not int or self.num_places < 0:
            raise ValueError(f"num_places must be a whole number of at least 0, not {self.num_places!r}")
        if (fault := next(_unsupported(self.llm), None)) is not None:
            raise ValueError(fault)

    @property
    def choices(self) -> Family:
        """The choices of its family."""
        return family(self.family)

    @property
    def num_features(self) -> int:
        """Rows of a video's record, each of which takes one position of the language model."""
        return self.num_frames + self.num_places

    @property
    def video_tokens(self) -> tuple[int, int] | None:
        """Ids of the tokens before and after a video, the last two of the vocabulary; None without them."""
        return (self.llm.vocab_size - 2, self.llm.vocab_size - 1) if self.choices.marks else None

    def marks(self, video_first: VideoFirst = "published") -> Marks | None:
        """How a video stands in a prompt; None for PiTe's prompts."""
        return None if self.video_tokens is None else Marks(*self.video_tokens, self.num_features, video_first)

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.llm.model_type]

    @property
    def head_dim(self) -> int:
        return getattr(self.llm, "head_dim", None) or self.llm.hidden_size // self.llm.num_attention_heads

    @property
    def context_length(self) -> int:
        """Positions of the longest sequence that the decoder computes as in the language model's training.

        That is the number of positions in its configuration, or its sliding window: up to the window's length, attention
        with a window is attention over the whole sequence, which is what the decoder computes.
        """
        return min(self._positions, self._window or self._positions)

    @property
    def context(self) -> str:
        """`context_length` in words, with the setting that limits it."""
        if self.context_length < self._positions:
            return f"the {self.context_length:,} positions of the language model's sliding window (sliding_window)"
        return f"the {self.context_length:,} positions that the language model was trained on (max_position_embeddings)"

    @property
    def _window(self) -> int | None:
        """Number of keys to which a query attends in the layers with a sliding window; None without such layers."""
        return _sliding_window(self.llm)

    @property
    def _positions(self) -> int:
        rope, length = self.llm.rope_parameters, int(self.llm.max_position_embeddings)
        if rope["rope_type"] == "linear":  # such as Vicuna v1.5-16k, which gives the length before the scaling
            return int(length * rope["factor"])
        return max(length, int((rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 1)))

    def beyond_context(self, length: int) -> str | None:
        """A warning if a sequence of `length` tokens is longer than the context, else None."""
        if length <= self.context_length:
            return None
        return (
            f"a sequence of {length:,} tokens is longer than {self.context}, and its output beyond them is unreliable"
        )

    @property
    def arithmetic(self) -> dict[str, Any]:
        """The settings that, together with the weights, determine what the language model computes."""
        llm = self.llm
        added = {} if llm.model_type == "llama" else {"architecture": llm.model_type}
        return {
            **added,
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
    def load(directory: Path, **overrides: Any) -> PiTeConfig:
        """Read DIRECTORY/config.json of a PiTe model, or of a plain language model; PiTe's own numbers default as above.

        Raises ValueError, naming the file, for any other configuration and for settings that the decoder does not
        support.
        """
        path = directory / "config.json"
        if not path.exists():
            raise ValueError(f"{directory} holds no config.json: it is not a Hugging Face model directory")
        values = read_json_object(path)
        model_type = values.pop("model_type", "llama")
        architecture_name = "llama" if model_type in ("pite", *MODEL_TYPES) else str(model_type)
        if (architecture := ARCHITECTURES.get(architecture_name)) is None:
            raise ValueError(
                f"{path}: model_type {model_type!r} is not supported: the decoder computes {', '.join(ARCHITECTURES)}"
            )
        numbers = ("num_frames", "num_points", "vision_feature_size", "family", "num_places")
        saved: dict[str, Any] = {name: values.pop(name) for name in numbers if name in values}
        own = own_numbers(directory, values, saved, overrides)
        try:
            llm = architecture.config(**values)
        except Exception as error:  # a wrong value makes transformers and its validators raise any exception
            raise ValueError(f"{path} is not a valid {architecture.name} configuration: {reason(error)}") from None
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
            **({} if self.family == "pite" else {"family": self.family, "num_places": self.num_places}),
            **(published_settings(vars(self.llm), self.vision_feature_size) if self.choices.marks else {}),
        }
        write_atomically(directory / "config.json", json.dumps(values, indent=1, sort_keys=True) + "\n")


def check_family(config: PiTeConfig, wanted: Name | None, model: Path | str) -> None:
    """Raise ValueError if a model is of another family than `wanted`; None accepts any."""
    if wanted not in (None, config.family):
        raise ValueError(f"{model} is a model of the family {config.family}: leave --family {wanted} out")


def _sliding_window(llm: LanguageModelConfig) -> int | None:
    settings = vars(llm)
    layers = settings.get("layer_types")
    unused = layers is not None and "sliding_attention" not in layers
    if unused or not settings.get("use_sliding_window", True):
        return None
    return settings.get("sliding_window")


def _unsupported(llm: LanguageModelConfig) -> Iterator[str]:
    """Yield one sentence for each setting that changes the computation and that the decoder does not support.

    Two settings are accepted: `pretraining_tp` splits a product into summands, and `attention_dropout` acts in training
    only.
    """
    settings = vars(llm)
    if llm.hidden_act not in ("silu", "swish"):
        yield f"hidden_act {llm.hidden_act!r} is not supported: the decoder computes SwiGLU, whose activation is 'silu'"
    if any(settings.get(name) for name in ("attention_bias", "mlp_bias")):
        yield "attention_bias and mlp_bias are not supported: the only biases are those of Qwen2's q, k and v"
    yield from _unsupported_rope(llm.rope_parameters)
    if settings.get("quantization_config"):
        yield "it has a quantization_config, and quantized weights are not supported: give the unquantized model"
    if settings.get("attention_chunk_size"):
        yield (
            f"attention_chunk_size {settings['attention_chunk_size']} is not supported: attention is over the whole "
            "sequence; set it to null if the model was trained without it"
        )
    layers = set(settings.get("layer_types") or ())
    if layers - {"full_attention", "sliding_attention"}:
        yield "layer_types other than full_attention and sliding_attention are not supported"
    if "sliding_attention" in layers and _sliding_window(llm) is None:
        yield "layer_types has sliding_attention, and sliding_window is not given: set it to the window's length"
    if llm.num_attention_heads % llm.num_key_value_heads:
        yield f"{llm.num_attention_heads} attention heads cannot share {llm.num_key_value_heads} key and value heads"


def _unsupported_rope(rope: dict[str, Any]) -> Iterator[str]:
    kind = rope.get("rope_type")
    if kind in ("dynamic", "longrope"):
        yield (
            f"rotary embeddings of type {kind!r} are not supported: their frequencies depend on the longest sequence "
            "of a batch, so a sample's loss would depend on the other samples"
        )
    elif kind not in ("default", "linear", "yarn", "llama3"):
        yield f"rotary embeddings of type {kind!r} are not supported: the decoder computes default, linear, yarn, llama3"
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1):
        yield f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported: Llama rotates whole heads"
