"""Where the documents of a Hugging Face batch begin and end, and the batch as one packed row without padding.

A batch has B rows of T tokens. Boundaries are given (`cu_seq_lens_q`), or found: padding by the attention mask, several
documents in one row by positions that restart at 0. Finding them reads the mask or the positions on the host, which
waits for the GPU; given boundaries do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pite_kernels.rows import put_rows, take_rows


@dataclass(frozen=True)
class Documents:
    """The documents of a batch of B rows of T tokens, N of which are not padding.

    shape       (B, T)
    cu_seqlens  (S + 1,) int32, the boundaries: 0, ..., N
    longest     at least the longest document's length
    tokens      (N,) int64, the tokens in the flattened batch that are not padding; None: all
    """

    shape: tuple[int, int]
    cu_seqlens: Tensor
    longest: int
    tokens: Tensor | None = None

    @property
    def one_row(self) -> bool:
        """Whether the batch is one row without padding already."""
        return self.tokens is None and self.shape[0] == 1

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) as one row (1, N, ...)."""
        flat = x.flatten(0, 1)
        return (flat if self.tokens is None else take_rows(flat, self.tokens))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """One row (1, N, ...) as (B, T, ...), zero where the padding is."""
        row = x[0]
        if self.tokens is not None:
            row = put_rows(row, self.tokens.to(row.device), self.shape[0] * self.shape[1])
        return row.unflatten(0, self.shape)

    def pack_positions(self, position_ids: Tensor | None) -> Tensor:
        """Positions (..., B, T) as (..., 1, N). None: they count from 0 in each document."""
        if position_ids is None:
            return (torch.arange(self.count, device=self.cu_seqlens.device) - self._starts())[None]
        flat = position_ids.expand(*position_ids.shape[:-2], *self.shape).flatten(-2)
        return (flat if self.tokens is None else flat.index_select(-1, self.tokens)).unsqueeze(-2)

    def restart(self, position_ids: Tensor) -> Tensor:
        """Positions (C, 1, N) of one row, shifted so that each document begins at 0."""
        return position_ids - position_ids.index_select(-1, self._starts())

    def owners(self) -> Tensor:
        """(B * T,) int64: the document of each token, -1 for padding."""
        numbers = self._repeat(torch.arange(len(self.cu_seqlens) - 1, device=self.cu_seqlens.device))
        if self.tokens is None:
            return numbers
        return numbers.new_full((self.shape[0] * self.shape[1],), -1).index_copy_(0, self.tokens, numbers)

    @property
    def count(self) -> int:
        """N"""
        return self.shape[0] * self.shape[1] if self.tokens is None else len(self.tokens)

    def _starts(self) -> Tensor:
        """(N,) int64: where the document of each token begins."""
        return self._repeat(self.cu_seqlens[:-1].long())

    def _repeat(self, values: Tensor) -> Tensor:
        # With `output_size` nothing is copied to the host.
        return torch.repeat_interleave(values, self.cu_seqlens.diff(), output_size=self.count)


@torch.compiler.disable
def find_documents(
    shape: tuple[int, int],
    device: torch.device,
    *,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Documents:
    """The documents of a batch (B, T) on `device`.

    cu_seqlens, longest  boundaries (S + 1,) of the documents in one row, and the longest length; on the CPU they are
                         compared with text positions, on a GPU they are taken as given
    attention_mask       (B, T), 0 for padding: each row is a document
    position_ids         (B, T), or (C, B, T) where images have C coordinates. Without boundaries and mask, a document
                         begins wherever all C are 0; each row begins a document too
    Raises ValueError where these contradict each other.
    """
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("patch: pass either cu_seq_lens_q or attention_mask; with boundaries leave the mask out")
        return _given(shape, device, cu_seqlens, longest, position_ids)
    if attention_mask is not None:
        return _unpadded(shape, device, attention_mask, position_ids)
    starts = torch.zeros(shape, dtype=torch.bool)
    if position_ids is not None:
        starts |= _restarts(position_ids, shape, strict=True)
    starts[:, :1] = True
    bounds = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
    return Documents(shape, bounds.to(device, torch.int32, non_blocking=True), int(bounds.diff().max()))


def _given(
    shape: tuple[int, int], device: torch.device, cu_seqlens: Tensor, longest: int | None, position_ids: Tensor | None
) -> Documents:
    bounds = cu_seqlens.flatten()
    if shape[0] != 1:
        raise ValueError(f"patch: cu_seq_lens_q divides one row of tokens, but the batch has {shape[0]} rows")
    if not bounds.is_cuda:
        lengths = bounds.diff()
        if len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != shape[1] or bool((lengths < 0).any()):
            raise ValueError(f"patch: cu_seq_lens_q must rise from 0 to the number of tokens, {shape[1]}")
        if longest is not None and longest < int(lengths.max()):
            raise ValueError(f"patch: max_length_q is {longest}, but a document has {int(lengths.max())} tokens")
        if position_ids is not None and position_ids.dim() == 2 and not position_ids.is_cuda:
            starts = torch.zeros(shape[1], dtype=torch.bool).index_fill(0, bounds[:-1][lengths > 0].long().cpu(), True)
            if not torch.equal(position_ids[0] == 0, starts):
                raise ValueError(
                    "patch: position_ids do not restart at 0 exactly where cu_seq_lens_q begins a document; "
                    "leave position_ids out, or correct one of the two"
                )
    longest = int(bounds.diff().max()) if longest is None else int(longest)
    return Documents(shape, bounds.to(device, torch.int32, non_blocking=True), longest)


def _unpadded(
    shape: tuple[int, int], device: torch.device, attention_mask: Tensor, position_ids: Tensor | None
) -> Documents:
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"patch: attention_mask must be {shape} with 0 for padding, not {tuple(attention_mask.shape)}; "
            "documents that share a row need cu_seq_lens_q"
        )
    host = attention_mask.cpu()
    real = host.bool()
    if not torch.equal(real.to(host.dtype), host):
        raise ValueError(
            "patch: attention_mask must be 0 or 1; for documents that share a row leave it out and pass cu_seq_lens_q"
        )
    if bool(((real & ~F.pad(real, (1, -1))).sum(1) > 1).any()):
        raise ValueError(
            "patch: attention_mask has zeros between the tokens of a row, but only padding may be excluded"
        )
    if position_ids is not None:
        inside = _restarts(position_ids, shape, strict=False) & real & (real.cumsum(1) > 1)
        if bool(inside.any()):
            raise ValueError(
                "patch: position_ids restart at 0 inside a row that attention_mask makes one document; "
                "leave the mask out, or pass cu_seq_lens_q"
            )
    lengths = real.sum(1)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32, non_blocking=True)
    tokens = None if bool(real.all()) else real.flatten().nonzero().flatten().to(device, non_blocking=True)
    return Documents(shape, bounds, int(lengths.max()), tokens)


def _restarts(position_ids: Tensor, shape: tuple[int, int], *, strict: bool) -> Tensor:
    """(B, T) bool on the host: where positions are 0. `strict` demands that text positions rise by 1 elsewhere."""
    coordinates = position_ids.cpu()
    if coordinates.dim() == 2:
        coordinates = coordinates[None]
    if len(coordinates) == 4:  # the positions of text come first, then those of images
        coordinates = coordinates[:1]
    zero = (coordinates == 0).all(0)
    if strict and len(coordinates) == 1 and not bool(((coordinates[0].diff() == 1) | zero[:, 1:]).all()):
        raise ValueError(
            "patch: position_ids neither rise by 1 nor restart at 0, so they do not show where documents begin; "
            "pass cu_seq_lens_q and max_length_q"
        )
    return zero.expand(shape)
