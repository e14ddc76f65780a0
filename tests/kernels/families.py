"""Tiny random video-language models of transformers, and random videos with questions and answers for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY, VIDEO, PAD = 64, 60, 0
POINTS, FRAMES = 2, 3
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=PAD,
)
VISION = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
    projection_dim=16,
)
MARKS = dict(vision_start_token_id=62, vision_end_token_id=63)
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


@dataclass(frozen=True)
class Document:
    """One video and its text: the model's inputs, with labels and trajectories of some answer tokens."""

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Family:
    """A model, and a function that makes a random video: its inputs, and its tokens in runs that text separates."""

    model: PreTrainedModel
    video: Callable[[torch.Generator], tuple[dict[str, Tensor], Sequence[int]]]


def llava_family(name: str, frame_tokens: Callable[[int], int], text: dict[str, Any] | None = None) -> Family:
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION,
        text_config={**TEXT, "model_type": "llama", **(text or {})},
        image_token_index=61,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
    )

    def video(g: torch.Generator) -> tuple[dict[str, Tensor], Sequence[int]]:
        return {"pixel_values_videos": torch.randn(1, 8, 3, 16, 16, generator=g)}, [8 * frame_tokens(2)]

    return Family(getattr(transformers, f"{name}ForConditionalGeneration")(config), video)


def llava_onevision_family() -> Family:
    config = transformers.LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 32},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=61,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
    )

    def video(g: torch.Generator) -> tuple[dict[str, Tensor], Sequence[int]]:
        return {"pixel_values_videos": torch.randn(1, 3, 3, 32, 32, generator=g)}, [3 * 4 + 1]  # a newline at the end

    return Family(transformers.LlavaOnevisionForConditionalGeneration(config), video)


def internvl_family() -> Family:
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.InternVLConfig(
        vision_config=dict(vision, image_size=[16, 16], patch_size=[4, 4]),
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=VIDEO,
        tie_word_embeddings=False,
    )

    def video(g: torch.Generator) -> tuple[dict[str, Tensor], Sequence[int]]:
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=g)}, [4, 4, 4]

    return Family(transformers.InternVLForConditionalGeneration(config), video)


def smolvlm_family() -> Family:
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.SmolVLMConfig(
        vision_config=dict(vision, image_size=16, patch_size=4),
        text_config={**TEXT, "model_type": "llama"},
        image_token_id=VIDEO,
        pad_token_id=PAD,
        scale_factor=2,
    )

    def video(g: torch.Generator) -> tuple[dict[str, Tensor], Sequence[int]]:
        return {"pixel_values": torch.randn(1, 3, 3, 16, 16, generator=g)}, [4, 4, 4]

    return Family(transformers.SmolVLMForConditionalGeneration(config), video)


def video_llama3_family() -> Family:
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
    config = transformers.VideoLlama3Config(
        vision_config=vision,
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=61,
        video_token_id=VIDEO,
    )

    def video(g: torch.Generator) -> tuple[dict[str, Tensor], Sequence[int]]:
        inputs = {
            "pixel_values_videos": torch.randn(3 * 16, 3 * 4 * 4, generator=g),
            "video_grid_thw": torch.tensor([[3, 4, 4]]),
            "video_merge_sizes": torch.tensor([2]),
        }
        return inputs, [12]

    return Family(transformers.VideoLlama3ForConditionalGeneration(config), video)


def qwen_family(name: str, vision: dict[str, Any], runs: Sequence[int], text: dict[str, Any] | None = None) -> Family:
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(TEXT, rope_parameters=MROPE, **(text or {})),
        vision_config=dict(depth=2, num_heads=2, patch_size=4, **vision),
        image_token_id=61,
        video_token_id=VIDEO,
        **MARKS,
    )

    def video(g: torch.Generator) -> tuple[dict[str, Tensor], Sequence[int]]:
        grid = torch.tensor([[3, 4, 4]])  # time, height, width in patches; 2 x 2 patches make one token
        return {"pixel_values_videos": torch.randn(48, 3 * 2 * 4 * 4, generator=g), "video_grid_thw": grid}, runs

    return Family(getattr(transformers, f"{name}ForConditionalGeneration")(config), video)


FAMILIES: dict[str, Callable[[], Family]] = {
    "VideoLlava": lambda: llava_family("VideoLlava", lambda side: side**2 + 1),
    "LlavaNextVideo": lambda: llava_family("LlavaNextVideo", lambda side: (side // 2) ** 2),
    "Qwen2VL": lambda: qwen_family("Qwen2VL", dict(embed_dim=16, hidden_size=32, mlp_ratio=2), [12]),
}
"""Used with the lines of docs/kernels.md, and patched."""

MORE_FAMILIES: dict[str, Callable[[], Family]] = {
    "Qwen2_5_VL": lambda: qwen_family(
        "Qwen2_5_VL",
        dict(hidden_size=16, out_hidden_size=32, intermediate_size=24, window_size=16, fullatt_block_indexes=[1]),
        [12],
    ),
    "Qwen3VL": lambda: qwen_family(
        "Qwen3VL",
        dict(hidden_size=16, out_hidden_size=32, intermediate_size=24, num_position_embeddings=16,
             deepstack_visual_indexes=[0]),
        [4, 4, 4],
        dict(head_dim=8),
    ),
    "LlavaOnevision": llava_onevision_family,
    "InternVL": internvl_family,
    "SmolVLM": smolvlm_family,
    "VideoLlama3": video_llama3_family,
}  # fmt: skip
"""Only patched."""


def document(family: Family, words: int, seed: int) -> Document:
    g = torch.Generator().manual_seed(seed)
    video, runs = family.video(g)
    question = torch.randint(1, 50, (3,), generator=g)
    answer = torch.randint(1, 50, (words,), generator=g)
    marks = torch.tensor([62]), torch.tensor([63])
    tokens = torch.cat([part for run in runs for part in (torch.full((run,), VIDEO), torch.tensor([59]))])[:-1]
    ids = torch.cat([question, marks[0], tokens, marks[1], question, answer])
    labels = torch.full_like(ids, -100)
    labels[-words:] = answer
    rows = torch.arange(len(ids) - words, len(ids), 2) - 1
    targets = torch.rand(len(rows), POINTS, FRAMES, 2, generator=g)
    targets[torch.rand(len(rows), POINTS, FRAMES, generator=g) < 0.4] = -1
    types = torch.where(ids == VIDEO, 2, 0)
    return Document({"input_ids": ids[None], "mm_token_type_ids": types[None], **video}, labels, rows, targets)


def inputs_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Qwen2-VL and its successors need the type of each token; the other models do not accept this argument."""
    needed = hasattr(model.model, "get_rope_index")
    return inputs if needed else {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}


def joined(model: PreTrainedModel, documents: Sequence[Document]) -> dict[str, Tensor]:
    """The documents in one row, one after the other."""
    along_row = ("input_ids", "mm_token_type_ids")
    both = {
        name: torch.cat([d.inputs[name] for d in documents], 1 if name in along_row else 0)
        for name in documents[0].inputs
    }
    return inputs_of(model, both)


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad))
    values = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, values) if g is not None}


def assert_gradients_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
