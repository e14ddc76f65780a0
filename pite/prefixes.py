"""Answers to several questions about each video, with the prompts' common beginnings computed once.

    head, the same for all prompts | frames, the same for all questions about a video | question | answer

Under a causal mask the keys and values of a prefix do not depend on what follows. Those of the head are computed once
for all videos, and those of the frames once for all questions about a video. Each batch of questions gets a copy,
because a KV cache grows in place: a copy costs memory traffic, and computing it again costs the whole model.

`Generator.answer` computes everything anew. The answers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from pite.generate import Answer, Generator, left_padding

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (B, kv_heads, rows, head_dim)."""


@dataclass
class Rows:
    """Rows of prompts that were computed: of the head, of frames, and of questions (without padding)."""

    head: int = 0
    frames: int = 0
    questions: int = 0


@dataclass(frozen=True)
class VideoPrefixes:
    """Keys and values of the prompts' beginnings for V videos: the head and the frames, `length` rows each."""

    layers: Layers
    length: int


class SharedPrefixes:
    """Answers questions about videos whose frames were computed before.

    It holds the head's keys and values only. The caller holds those of the videos: 2 * layers * kv_heads * head_dim
    numbers for each row of the head and frames, which is 71 MB a video in a 7B model in bfloat16 (by count).
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.rows = Rows()
        self._head: Layers | None = None

    @torch.inference_mode()
    def videos(self, features: Sequence[np.ndarray]) -> VideoPrefixes:
        """Compute the frames of V videos, whose features (N, C) have one shape, in one pass."""
        model, head = self.generator.model, self._head_layers()
        records = torch.from_numpy(np.stack(features)).to(model.device)
        count, frames = records.shape[:2]
        rows = torch.arange(count * frames, device=model.device)
        embeddings = model.embed(torch.zeros_like(rows), records.flatten(0, 1), rows).view(count, frames, -1)
        cache = _cache([(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in head])
        self.generator.llama.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        self.rows.frames += count * frames
        layers = _layers(cache)
        return VideoPrefixes(layers, layers[0][0].shape[2])

    @torch.inference_mode()
    def answer(
        self,
        questions: Sequence[str],
        prefixes: VideoPrefixes,
        videos: Sequence[int],
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
    ) -> list[Answer]:
        """Answer each question about the video with its number among `prefixes`; greedy at temperature 0.

        Questions are padded on the left, between the frames and the question, and the padding is masked. Raises
        ValueError for a prompt that leaves no room for an answer.
        """
        generator, device = self.generator, self.generator.model.device
        head = self._head_length()
        tails = []
        for question in questions:
            prompt, _ = generator.prompt(question, prefixes.length - head)
            tails.append(torch.from_numpy(prompt[prefixes.length :]))
        lengths = [len(tail) for tail in tails]
        room = [generator.room(prefixes.length + length, max_new_tokens) for length in lengths]
        # `generate` takes the ids of the whole sequence and leaves out what the cache holds.
        ids = torch.zeros(len(tails), prefixes.length + max(lengths), dtype=torch.long)
        for row, tail in zip(ids, tails, strict=True):
            row[len(row) - len(tail) :] = tail
        own = left_padding(lengths, device)
        mask = torch.cat([own.new_ones(len(tails), prefixes.length), own], dim=1)
        which = torch.tensor(videos, device=device)
        cache = _cache([(k.index_select(0, which), v.index_select(0, which)) for k, v in prefixes.layers])
        self.rows.questions += sum(lengths)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask, "past_key_values": cache}
        return generator.complete(room, temperature, **inputs)

    def _head_length(self) -> int:
        return self._head_layers()[0][0].shape[2]

    def _head_layers(self) -> Layers:
        """Keys and values of the prompts' head, computed at the first call."""
        if self._head is None:
            # The head does not depend on the question.
            ids, start = self.generator.prompt("?", 1)
            cache = DynamicCache()
            head = torch.from_numpy(ids[None, :start]).to(self.generator.model.device)
            self.generator.llama.model(input_ids=head, past_key_values=cache, use_cache=True)
            self.rows.head += start
            self._head = _layers(cache)
        return self._head


def _cache(layers: Layers) -> DynamicCache:
    """A cache that begins with a copy of keys and values."""
    cache = DynamicCache()
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache


def _layers(cache: DynamicCache) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]
