"""The losses and packed attention inside three public video-language models, against each model's own code.

Two videos of different lengths go through a model twice: one by one with the model's own attention and loss, and packed
with ours. The models are those of transformers, tiny, with random weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pite_kernels import FusedLinearCrossEntropyLoss, FusedTrajectoryL1Loss, packed_attention, row_index
from tests.kernels.families import (
    FAMILIES,
    FRAMES,
    POINTS,
    VIDEO,
    Document,
    assert_gradients_equal,
    document,
    gradients,
    inputs_of,
    joined,
)


def attend(module, q, k, v, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, kv=(None, None, None), **_):
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    rows, bounds, longest = kv
    keys = {"kv_rows": rows, "cu_seqlens_kv": bounds, "max_seqlen_kv": longest}
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, **keys, scale=scaling)[None], None


AttentionInterface.register("pite_kernels", attend)


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
    hidden = model.model(
        **joined(model, documents),
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
    row = {
        name: torch.cat([first[name][:, :n], *(d.inputs[name][:, n:] for d in documents)], 1)
        for name in ("input_ids", "mm_token_type_ids")
    }
    positions = [position_ids(model, d) for d in documents]
    hidden = model.model(
        **inputs_of(model, {**first, **row}),
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
    trainable = nn.ModuleDict({"model": model, "head": head})
    model.set_attn_implementation("sdpa")
    own = own_loss(model, head, documents)
    expected = gradients(own, trainable)
    model.set_attn_implementation({"text_config": "pite_kernels"})
    loss = (shared_loss if shared else packed_loss)(model, head, documents)
    torch.testing.assert_close(loss, own)
    got = gradients(loss, trainable)
    assert any("projector" in n or "visual" in n for n in got), "no gradient reached the video"
    assert_gradients_equal(got, expected)
