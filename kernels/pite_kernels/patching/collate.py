"""A padded Hugging Face batch as one packed row, made in the data loader, where nothing waits for the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pite_kernels.patching.documents import find_documents

_IGNORED = -100
"""transformers' label of a token without a loss."""


def pack_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """One row without padding, with what a patched model needs in order not to synchronize with the GPU.

    batch  a collator's output on the CPU: input_ids (B, T), attention_mask (B, T), labels (B, T) with -100 for tokens
           without a loss. Other integer (B, T) tensors, such as mm_token_type_ids, are packed too; pixels are passed on
           Documents that share a row already stay apart, by cu_seq_lens_q or by position_ids that restart at 0
    Returns input_ids and labels (1, N), cu_seq_lens_q (S + 1,) int32, max_length_q, and with labels also rows and
    target_ids (L,). A document's first label becomes -100, because no token predicts it. transformers'
    DataCollatorWithFlattening would drop the pixels. Raises ValueError for other types and shapes, and for boundaries
    that contradict each other.
    """
    _check(batch)
    ids, positions = batch["input_ids"], batch.get("position_ids")
    shape = (ids.shape[0], ids.shape[1])
    documents = find_documents(
        shape,
        ids.device,
        cu_seqlens=batch.get("cu_seq_lens_q"),
        longest=batch.get("max_length_q"),
        attention_mask=batch.get("attention_mask"),
        position_ids=positions,
    )
    row: dict[str, Any] = {}
    for name, value in batch.items():
        per_token = isinstance(value, Tensor) and tuple(value.shape) == shape and not value.is_floating_point()
        row[name] = documents.pack(value) if per_token else value
    row.pop("attention_mask", None)
    if positions is not None:
        row["position_ids"] = documents.pack_positions(positions)
    row |= {"cu_seq_lens_q": documents.cu_seqlens, "max_length_q": documents.longest}
    if batch.get("labels") is None:
        return row
    starts = documents.cu_seqlens[:-1][documents.cu_seqlens.diff() > 0]
    labels = row["labels"][0].index_fill(0, starts.long(), _IGNORED)
    rows = (labels[1:] != _IGNORED).nonzero().flatten()
    return row | {"labels": labels[None], "rows": rows, "target_ids": torch.index_select(labels, 0, rows + 1)}


def _check(batch: Mapping[str, Any]) -> None:
    """Raise ValueError unless the tensors that `pack_batch` reads have the types and shapes that it documents."""
    if not isinstance(batch, Mapping) or batch.get("input_ids") is None:
        raise ValueError("pack_batch: takes a collator's output, a mapping with input_ids (B, T)")
    for name in ("input_ids", "attention_mask", "labels", "position_ids", "cu_seq_lens_q"):
        value = batch.get(name)
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"pack_batch: {name} is a {type(value).__name__}; let the collator return tensors")
        if value is not None and value.is_floating_point() and name != "attention_mask":
            raise ValueError(f"pack_batch: {name} must be integers, not {value.dtype}")
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"pack_batch: input_ids must be (B, T) with at least one token, not {shape}")
    for name in ("labels", "attention_mask"):
        if batch.get(name) is not None and tuple(batch[name].shape) != shape:
            raise ValueError(f"pack_batch: {name} must be {shape} as input_ids, not {tuple(batch[name].shape)}")
    positions = batch.get("position_ids")
    if positions is not None and tuple(positions.shape[-2:]) not in (shape, (1, shape[1])):
        raise ValueError(f"pack_batch: position_ids must end in {shape} as input_ids, not {tuple(positions.shape)}")
    longest = batch.get("max_length_q")
    if longest is not None and not isinstance(longest, int | Tensor):
        raise ValueError(f"pack_batch: max_length_q must be an integer, not {longest!r}")
