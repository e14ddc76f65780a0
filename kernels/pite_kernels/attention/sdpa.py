"""Attention over packed documents in batched SDPA calls, on any device.

A causal mask is enough for documents that are padded to one length, because the padding at a document's end is in the
future of all its tokens.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Overhead of one more SDPA call (slicing, dispatch, backward nodes), in units of heads x head_dim x length^2.
# About 100 us on one AVX-512 core. Documents are padded to share a call while the padding is cheaper than that.
_CALL_COST = 450_000


def batched_sdpa(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, _longest: int, _longest_k: int, causal: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    bounds, key_bounds = tuple(of_q.tolist()), tuple(of_k.tolist()) if of_k is not of_q else None
    for name, ends, rows in (("cu_seqlens", bounds, q), ("cu_seqlens_kv", key_bounds or bounds, k)):
        if ends[:1] != (0,) or ends[-1] != rows.shape[0] or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"packed_attention: {name} must rise from 0 to the number of rows, {rows.shape[0]}")
    if q.shape[0] == 0:
        return q * (k.sum() + v.sum())  # empty, but still part of the autograd graph of all three inputs
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    groups, order = _plan(bounds, key_bounds or bounds, q.shape[1] * q.shape[2], causal)
    parts = [_attend_group(q, k, v, group, causal, scale) for group in groups]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out if order is None else out.index_select(0, order.to(q.device))


class _Group(NamedTuple):
    """Documents that share an SDPA call.

    documents      their number B
    queries, keys  (B * M,) and (B * N,) gathered rows of q and of k, v
    last_key       (B, 1, M, 1) the last of the N keys that a query attends to, where a document has more keys than
                   queries and attention is causal; else None. The mask would be N times as large, and plans are kept
    real           positions of the real queries among the B * M, None if all are
    """

    documents: int
    queries: Tensor
    keys: Tensor
    last_key: Tensor | None
    real: Tensor | None


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: _Group, causal: bool, scale: float) -> Tensor:
    queries = group.queries.to(q.device)
    keys = queries if group.keys is group.queries else group.keys.to(q.device)
    qs, ks, vs = (
        t.index_select(0, rows).view(group.documents, -1, *t.shape[1:]).transpose(1, 2)
        for t, rows in ((q, queries), (k, keys), (v, keys))
    )
    mask = None
    if group.last_key is not None:
        mask = torch.arange(ks.shape[2], device=q.device) <= group.last_key.to(q.device)  # (B, 1, M, N)
    # The padding of a document repeats its last token: all scores stay finite, and the padding's gradients are zero.
    out = F.scaled_dot_product_attention(qs, ks, vs, mask, is_causal=causal and mask is None, scale=scale)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if group.real is None else out.index_select(0, group.real.to(q.device))


@lru_cache(maxsize=64)
def _plan(
    bounds: tuple[int, ...], key_bounds: tuple[int, ...], width: int, causal: bool
) -> tuple[list[_Group], Tensor | None]:
    """Batches of documents, those with most keys first.

    The second result is the index that undoes the sorting (None if the order has not changed).
    """
    starts, key_starts = bounds[:-1], key_bounds[:-1]
    queries, keys = ([b - a for a, b in itertools.pairwise(ends)] for ends in (bounds, key_bounds))
    documents = sorted((d for d, n in enumerate(queries) if n), key=lambda d: (-keys[d], -queries[d], d))
    if any((queries[d] if causal else 1) > keys[d] for d in documents):
        raise ValueError("packed_attention: a document has fewer keys than queries, or none")
    groups: list[_Group] = []
    for batch in _batches(documents, queries, keys, width, causal):
        first_query, m, first_key, n = (
            torch.tensor([values[d] for d in batch])[:, None] for values in (starts, queries, key_starts, keys)
        )
        query, key = torch.arange(int(m.max())), torch.arange(int(n.max()))
        rows = (first_query + query.minimum(m - 1)).flatten()
        key_rows = rows if bounds == key_bounds else (first_key + key.minimum(n - 1)).flatten()
        last_key = None
        if causal and not torch.equal(m, n):
            last_key = (n - m + query).minimum(n - 1)[:, None, :, None]
        real = (query < m).flatten()
        groups.append(
            _Group(len(batch), rows, key_rows, last_key, None if bool(real.all()) else real.nonzero().flatten())
        )
    visited = torch.cat([torch.arange(starts[d], starts[d] + queries[d]) for d in documents])
    order = visited.argsort()
    return groups, None if torch.equal(order, torch.arange(len(order))) else order


def _batches(documents: list[int], queries: list[int], keys: list[int], width: int, causal: bool) -> list[list[int]]:
    """Documents that are padded to one shape, where padding takes less time than one more call."""
    batches: list[list[int]] = []
    for d in documents:
        last = batches[-1] if batches else []
        most, longest = max((queries[i] for i in last), default=0), keys[last[0]] if last else 0
        area = longest * max(most, queries[d]) * (len(last) + 1)
        waste = width * (area - longest * most * len(last) - queries[d] * keys[d])
        # Without a causal mask queries would attend to the padding, so only documents of equal length share a call.
        equal = keys[d] == longest and queries[d] == most
        if last and (equal or (causal and waste < _CALL_COST)):
            last.append(d)
        else:
            batches.append([d])
    return batches
