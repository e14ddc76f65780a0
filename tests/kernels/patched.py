"""Batches for patched models, padded and packed, and the models' own losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.kernels.families import (
    FAMILIES,
    MORE_FAMILIES,
    PAD,
    TEXT,
    Document,
    document,
    inputs_of,
    joined,
)

ALL = {**FAMILIES, **MORE_FAMILIES}


def make(name: str = "LlavaNextVideo", words: Sequence[int] = (5, 9)) -> tuple[PreTrainedModel, list[Document]]:
    torch.manual_seed(0)
    family = ALL[name]()
    family.model.train()
    return family.model, [document(family, n, seed) for seed, n in enumerate(words)]


def padded(model: PreTrainedModel, documents: Sequence[Document], side: str = "right") -> dict[str, Tensor]:
    """A row for each document, as a processor of transformers makes it."""
    longest = max(len(d.labels) for d in documents)

    def pad(x: Tensor, value: int) -> Tensor:
        count = longest - x.shape[-1]
        return F.pad(x, (0, count) if side == "right" else (count, 0), value=value)

    rows = {
        name: torch.cat([pad(d.inputs[name], PAD) for d in documents]) for name in ("input_ids", "mm_token_type_ids")
    }
    others = {n: torch.cat([d.inputs[n] for d in documents]) for n in documents[0].inputs if n not in rows}
    mask = torch.cat([pad(torch.ones_like(d.inputs["input_ids"]), 0) for d in documents])
    labels = torch.stack([pad(d.labels, -100) for d in documents])
    return {**inputs_of(model, {**rows, **others}), "attention_mask": mask, "labels": labels}


def packed(model: PreTrainedModel, documents: Sequence[Document]) -> dict[str, Any]:
    """All documents in one row, with the boundaries as transformers' DataCollatorWithFlattening passes them."""
    lengths = [len(d.labels) for d in documents]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    given = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return {**joined(model, documents), "labels": torch.cat([d.labels for d in documents])[None], **given}


def one_by_one(model: PreTrainedModel, documents: Sequence[Document]) -> Tensor:
    """The model's own loss of separate documents, as a mean over all their words."""
    words = sum(int((d.labels != -100).sum()) for d in documents)
    return sum(
        (model(**inputs_of(model, d.inputs), labels=d.labels[None]).loss * (d.labels != -100).sum() / words
         for d in documents), torch.zeros(()))  # fmt: skip


@contextmanager
def raises(sentence: str) -> Iterator[None]:
    """A ValueError that is one sentence."""
    with pytest.raises(ValueError, match=sentence) as caught:
        yield
    assert str(caught.value).startswith(("patch: ", "pack_batch: ")) and "\n" not in str(caught.value)


def small(name: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    return kind(getattr(transformers, f"{name}Config")(**{**TEXT, **config})).train()
