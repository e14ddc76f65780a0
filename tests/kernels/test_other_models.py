"""The losses and packed attention inside three public video-language models, against each model's own code.

Two videos of different lengths go through a model twice: one by one with the model's own attention and loss, and packed
with ours. The models are those of transformers, tiny, with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from pite_kernels import FusedLinearCrossEntropyLoss, FusedTrajectoryL1Loss, packed_attention, row_index

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


def attend(module, q, k, v, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, kv=(None, None, None), **_):
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    rows, bounds, longest = kv
    keys = {"kv_rows": rows, "cu_seqlens_kv": bounds, "max_seqlen_kv": longest}
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, **keys, scale=scaling)[None], None


AttentionInterface.register("pite_kernels", attend)


@dataclass(frozen=True)
class Document:
    """One video and its text: the model's inputs, with labels and trajectories of some answer tokens."""

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Family:
    """A model, and a function that makes a random video: its inputs and its number of tokens."""

    model: PreTrainedModel
    video: Callable[[torch.Generator], tuple[dict[str, Tensor], int]]


def llava_family(config_class, model_class, frame_tokens: Callable[[int], int]) -> Family:
    config = config_class(
        vision_config=VISION,
        text_config=dict(TEXT, model_type="llama"),
        image_token_index=61,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
    )

    def video(g: torch.Generator) -> tuple[dict[str, Tensor], int]:
        return {"pixel_values_videos": torch.randn(1, 8, 3, 16, 16, generator=g)}, 8 * frame_tokens(2)

    return Family(model_class(config), video)


def qwen_family() -> Family:
    config = Qwen2VLConfig(
        text_config=dict(TEXT, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}),
        vision_config=dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4),
        image_token_id=61,
        video_token_id=VIDEO,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )

    def video(g: torch.Generator) -> tuple[dict[str, Tensor], int]:
        grid = torch.tensor([[3, 4, 4]])  # time, height, width in patches; 2 x 2 patches make one token
        return {"pixel_values_videos": torch.randn(48, 3 * 2 * 4 * 4, generator=g), "video_grid_thw": grid}, 12

    return Family(Qwen2VLForConditionalGeneration(config), video)


FAMILIES = {
    "VideoLlava": lambda: llava_family(VideoLlavaConfig, VideoLlavaForConditionalGeneration, lambda side: side**2 + 1),
    "LlavaNextVideo": lambda: llava_family(
        LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration, lambda side: (side // 2) ** 2
    ),
    "Qwen2VL": qwen_family,
}


def document(family: Family, words: int, seed: int) -> Document:
    g = torch.Generator().manual_seed(seed)
    video, tokens = family.video(g)
    question = torch.randint(1, 50, (3,), generator=g)
    answer = torch.randint(1, 50, (words,), generator=g)
    marks = torch.tensor([62]), torch.tensor([63])
    ids = torch.cat([question, marks[0], torch.full((tokens,), VIDEO), marks[1], question, answer])
    labels = torch.full_like(ids, -100)
    labels[-words:] = answer
    rows = torch.arange(len(ids) - words, len(ids), 2) - 1
    targets = torch.rand(len(rows), POINTS, FRAMES, 2, generator=g)
    targets[torch.rand(len(rows), POINTS, FRAMES, generator=g) < 0.4] = -1
    types = torch.where(ids == VIDEO, 2, 0)
    return Document({"input_ids": ids[None], "mm_token_type_ids": types[None], **video}, labels, rows, targets)


def another_question(d: Document, words: int, seed: int) -> Document:
    """A document about the same video: equal to `d` up to the mark after the video."""
    g = torch.Generator().manual_seed(seed)
    ids = d.inputs["input_ids"][0]
    ids = torch.cat([ids[: shared_length(d)], torch.randint(1, 50, (3 + words,), generator=g)])
    labels = torch.full_like(ids, -100)
    labels[-words:] = ids[-words:]
    rows = torch.arange(len(ids) - words, len(ids), 2) - 1
    targets = torch.rand(len(rows), POINTS, FRAMES, 2, generator=g)
    types = torch.where(ids == VIDEO, 2, 0)
    return Document({**d.inputs, "input_ids": ids[None], "mm_token_type_ids": types[None]}, labels, rows, targets)


def shared_length(d: Document) -> int:
    return int((d.inputs["input_ids"][0] == 63).nonzero()) + 1


def inputs_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Qwen2-VL needs the type of each token; the other models do not accept this argument."""
    return (
        inputs
        if hasattr(model.model, "get_rope_index")
        else {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    )


def own_loss(model: PreTrainedModel, head: nn.Linear, documents: list[Document]) -> Tensor:
    """Documents one by one: the model's own loss and a trajectory head in plain PyTorch, as means over all of them."""
    words = sum(int((d.labels != -100).sum()) for d in documents)
    coordinates = sum(int((d.targets != -1).sum()) for d in documents)
    total = torch.zeros(())
    for d in documents:
        out = model(**inputs_of(model, d.inputs), labels=d.labels[None], output_hidden_states=True)
        total = total + out.loss * (d.labels != -100).sum() / words
        predictions = head(out.hidden_states[-1][0, d.rows]).view_as(d.targets)
        present = d.targets != -1
        total = total + (predictions - d.targets)[present].abs().sum() / coordinates
    return total


def position_ids(model: PreTrainedModel, d: Document) -> Tensor:
    length = d.inputs["input_ids"].shape[1]
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(length)[None]
    positions, _ = model.model.get_rope_index(
        d.inputs["input_ids"],
        video_grid_thw=d.inputs["video_grid_thw"],
        mm_token_type_ids=d.inputs["mm_token_type_ids"],
    )
    return positions


def packed_loss(model: PreTrainedModel, head: nn.Linear, documents: list[Document]) -> Tensor:
    """All documents in one row, with the ops of pite_kernels."""
    lengths = [len(d.labels) for d in documents]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    joined: dict[str, Any] = {
        name: torch.cat([d.inputs[name] for d in documents], 1 if name in ("input_ids", "mm_token_type_ids") else 0)
        for name in documents[0].inputs
    }
    hidden = model.model(
        **inputs_of(model, joined),
        position_ids=torch.cat([position_ids(model, d) for d in documents], -1),
        cu_seq_lens_q=bounds,
        max_length_q=max(lengths),
        use_cache=False,
    ).last_hidden_state[0]
    supervised = [(d.labels != -100).nonzero().flatten() for d in documents]
    ids = torch.cat([d.labels[s] for d, s in zip(documents, supervised)])
    rows = torch.cat([s - 1 + start for s, start in zip(supervised, bounds.tolist())])
    trajectory_rows = torch.cat([d.rows + start for d, start in zip(documents, bounds.tolist())])
    targets = torch.cat([d.targets for d in documents])
    ce = FusedLinearCrossEntropyLoss()(hidden, model.lm_head.weight, ids, rows)
    return ce + FusedTrajectoryL1Loss()(hidden, head.weight, head.bias, targets, trajectory_rows)


def shared_loss(model: PreTrainedModel, head: nn.Linear, documents: list[Document]) -> Tensor:
    """Questions about one video: what stands before them is one segment, each question and answer another."""
    n = shared_length(documents[0])
    own = [len(d.labels) - n for d in documents]
    ends = torch.tensor([n, *own]).cumsum(0)
    prefix = [*range(n)]
    keys = [prefix, *([*prefix, *range(end - rows, end)] for end, rows in zip(ends[1:].tolist(), own))]
    bounds, key_bounds = (
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        for lengths in ([n, *own], [len(k) for k in keys])
    )
    index = row_index(torch.tensor([row for document in keys for row in document]), int(ends[-1]))
    first = documents[0].inputs
    joined = {
        name: torch.cat([first[name][:, :n], *(d.inputs[name][:, n:] for d in documents)], 1)
        for name in ("input_ids", "mm_token_type_ids")
    }
    positions = [position_ids(model, d) for d in documents]
    hidden = model.model(
        **inputs_of(model, {**first, **joined}),
        position_ids=torch.cat([positions[0][..., :n], *(p[..., n:] for p in positions)], -1),
        cu_seq_lens_q=bounds,
        max_length_q=max(n, *own),
        kv=(index, key_bounds, max(map(len, keys))),
        use_cache=False,
    ).last_hidden_state[0]
    starts = [end - len(d.labels) for d, end in zip(documents, ends[1:].tolist())]
    supervised = [(d.labels != -100).nonzero().flatten() for d in documents]
    ids = torch.cat([d.labels[s] for d, s in zip(documents, supervised)])
    rows = torch.cat([s - 1 + start for s, start in zip(supervised, starts)])
    ce = FusedLinearCrossEntropyLoss()(hidden, model.lm_head.weight, ids, rows)
    targets, at = (torch.cat(parts) for parts in zip(*((d.targets, d.rows + s) for d, s in zip(documents, starts))))
    return ce + FusedTrajectoryL1Loss()(hidden, head.weight, head.bias, targets, at)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_models_own_code(name, shared):
    torch.manual_seed(0)
    family = FAMILIES[name]()
    model = family.model.eval()
    head = nn.Linear(32, POINTS * FRAMES * 2)
    documents = [document(family, words, seed) for seed, words in enumerate((5, 8))]
    if shared:
        documents = [documents[0], *(another_question(documents[0], words, words) for words in (4, 7))]
    trainable = {**dict(model.named_parameters()), "head.weight": head.weight, "head.bias": head.bias}

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        values = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        return {n: g for n, g in zip(trainable, values) if g is not None}

    model.set_attn_implementation("sdpa")
    own = own_loss(model, head, documents)
    expected = gradients(own)
    model.set_attn_implementation({"text_config": "pite_kernels"})
    packed = (shared_loss if shared else packed_loss)(model, head, documents)
    torch.testing.assert_close(packed, own)
    got = gradients(packed)
    assert got.keys() == expected.keys()
    assert any("projector" in n or "visual" in n for n in got), "no gradient reached the video"
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            got[parameter], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}"
        )
