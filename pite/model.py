"""PiTe: frame features -> adapter -> packed decoder -> vocabulary, localization, trajectory heads (paper section 4.1).

This module runs the model on packed batches, and adds or merges LoRA. `pite.checkpoint` loads and saves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloaders.samples.batch import PackedBatch
from pite.config import PiTeConfig
from pite.decoder import Decoder, DecoderLayer, Documents, LoRALinear
from pite_kernels import RowIndex, linear_cross_entropy, two_head_loss

Head = Literal["localization", "trajectory"]

HEADS = ("vision_adapter", "localization_projector", "trajectory_projector")
"""PiTe's own modules; all other weights are the language model's."""


@dataclass(frozen=True)
class Losses:
    """Float32 scalars of one batch, each already divided by its global normalizer: total = ce + weight * l1."""

    total: Tensor
    ce: Tensor
    l1: Tensor


class PiTe(nn.Module):
    """A PiTe model on one device.

    The language model's weights are frozen and have `dtype`. Adapter, heads and LoRA are float32 and cast on use, so
    that small updates are not lost. `set_trainable` selects which of them are trained.
    """

    def __init__(self, config: PiTeConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        hidden, llm = config.llm.hidden_size, config.llm
        self.config = config
        self.decoder = Decoder(config, dtype)
        self.lm_head: nn.Parameter | None
        if llm.tie_word_embeddings:
            self.register_parameter("lm_head", None)
        else:
            self.lm_head = nn.Parameter(torch.empty(llm.vocab_size, hidden, dtype=dtype), requires_grad=False)
        self.vision_adapter = nn.Linear(config.vision_feature_size, hidden)
        self.localization_projector = nn.Linear(hidden, 2)
        self.trajectory_projector = nn.Linear(hidden, config.num_points * config.num_frames * 2)
        self.set_trainable(())

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.device

    @property
    def output_embedding(self) -> nn.Parameter:
        """The vocabulary head's weight (V, d): `lm_head`, or the embedding table where the two are tied."""
        return self.decoder.embed_tokens if self.lm_head is None else self.lm_head

    # -- trainable parameters ------------------------------------------------------------------------------------

    def linear_layers(self) -> Iterator[LoRALinear]:
        """Every fused linear layer of the decoder, in order."""
        for layer in self.decoder.layers:
            yield from cast(DecoderLayer, layer).linear_layers()

    def add_lora(self, rank: int, alpha: float, seed: int = 0) -> None:
        """Start a new LoRA on q, k, v, o, gate, up and down; the same seed gives the same A on every device."""
        generator = torch.Generator().manual_seed(seed)
        for linear in self.linear_layers():
            linear.add_lora(rank, alpha, generator)

    def merge_lora(self) -> None:
        """Fold the LoRA into the frozen weights and drop it."""
        for linear in self.linear_layers():
            linear.merge_lora()

    def quantize(self) -> None:
        """Replace the layers' frozen weights by float8 (`pite_kernels.fp8`) for training, after merging and `add_lora`.

        The files that a stage writes (LoRA and heads) do not change. Embeddings, norms and heads keep their dtype.
        """
        for linear in self.linear_layers():
            linear.quantize()

    @torch.no_grad()
    def cast_lora(self) -> None:
        """Round the LoRA to the model's dtype once, for all calls until it changes. Call again after each change of it.

        Without this, each micro-batch casts A and B in its forward and in its backward pass: 16 small kernels a layer.
        """
        pairs = [pair for linear in self.linear_layers() for pair in linear.casts(self.dtype)]
        if pairs:
            torch._foreach_copy_([cast for cast, _ in pairs], [value for _, value in pairs])

    def set_trainable(self, modules: tuple[str, ...]) -> None:
        """Make the named modules of HEADS trainable, and freeze the others; a LoRA is always trainable."""
        for head in HEADS:
            getattr(self, head).requires_grad_(head in modules)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def initialize_heads(self, seed: int) -> None:
        """Initialise adapter and heads. Random numbers are drawn on the CPU, so they are the same on every device.

        The adapter is initialised like `nn.Linear`. The coordinate heads start near the centre of the frame, because
        AdamW takes 0.5 / learning rate steps to move a bias there from 0.
        """
        generator = torch.Generator().manual_seed(seed)
        for name in HEADS:
            linear: nn.Linear = getattr(self, name)
            bound = 1 / math.sqrt(linear.in_features)
            for parameter in (linear.weight, linear.bias):
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        for head in (self.localization_projector, self.trajectory_projector):
            head.weight.mul_(0.1)
            head.bias.fill_(0.5)

    @torch.no_grad()
    def initialize_trajectory_head(self) -> None:
        """Initialise the trajectory head with P * N copies of stage 1's localization head (paper eq. 9)."""
        copies = self.config.num_points * self.config.num_frames
        self.trajectory_projector.weight.copy_(self.localization_projector.weight.repeat(copies, 1))
        self.trajectory_projector.bias.copy_(self.localization_projector.bias.repeat(copies))

    # -- forward -------------------------------------------------------------------------------------------------

    def embed(self, token_ids: Tensor, features: Tensor, feature_rows: Tensor) -> Tensor:
        """Input embeddings (T, d): token embeddings with adapted frame features (F, C) at `feature_rows`."""
        adapter = self.vision_adapter
        frames = F.linear(features.to(self.dtype), adapter.weight.to(self.dtype), adapter.bias.to(self.dtype))
        return F.embedding(token_ids, self.decoder.embed_tokens).index_copy(0, feature_rows, frames)

    def hidden_states(self, batch: PackedBatch, all_rows: bool = False) -> Tensor:
        """Final-norm hidden states of a packed batch: those of its `read_rows` (R, d), or of all rows (T, d)."""
        x = self.embed(batch.token_ids, batch.features, batch.feature_rows)
        read_rows = None if all_rows else batch.read_rows
        return cast(Tensor, self.decoder(x, batch.position_ids, _documents(batch), read_rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., d)."""
        return F.linear(hidden, self.output_embedding)

    def predict(self, hidden: Tensor, head: Head) -> Tensor:
        """Coordinates predicted from hidden states (M, d): (M, P, N, 2) trajectories or (M, 1, 1, 2) locations."""
        projector = self._projector(head)
        flat = F.linear(hidden.float(), projector.weight, projector.bias)
        shape = (self.config.num_points, self.config.num_frames) if head == "trajectory" else (1, 1)
        return flat.view(-1, *shape, 2)

    def forward(
        self,
        batch: PackedBatch,
        *,
        head: Head | None = None,
        label_smoothing: float = 0.0,
        trajectory_weight: float = 1.0,
        absent: Literal["skip", "regress"] = "skip",
    ) -> Losses:
        """Losses of one packed batch (paper eqs. 6, 8 and 10).

        head               which head's L1 is added; None is cross-entropy alone (stage 3)
        label_smoothing    eps, spread as eps / V over the vocabulary
        trajectory_weight  lambda
        absent             "skip": (-1, -1) coordinates have no loss; "regress": they are targets
        """
        hidden = self.hidden_states(batch)
        tokens, coordinates = batch.normalizers.unbind()
        if head is None:
            ce = linear_cross_entropy(
                hidden,
                self.output_embedding,
                batch.target_ids,
                batch.target_rows,
                label_smoothing=label_smoothing,
                normalizer=tokens,
            )
            return Losses(ce, ce.detach(), torch.zeros_like(ce, requires_grad=False))
        projector = self._projector(head)
        total, ce, l1 = two_head_loss(
            hidden,
            self.output_embedding,
            batch.target_ids,
            batch.target_rows,
            projector.weight,
            projector.bias,
            batch.trajectory,
            batch.trajectory_rows,
            label_smoothing=label_smoothing,
            weight=trajectory_weight,
            normalizers=(tokens, coordinates),
            absent=absent,
        )
        return Losses(total, ce.detach(), l1.detach())

    def _projector(self, head: Head) -> nn.Linear:
        return self.trajectory_projector if head == "trajectory" else self.localization_projector


def _documents(batch: PackedBatch) -> Documents:
    rows, inverse, offsets = batch.kv_rows, batch.kv_inverse, batch.kv_offsets
    if rows is None or inverse is None or offsets is None:
        return Documents(batch.cu_seqlens, batch.max_seqlen)
    index = RowIndex(rows, inverse, offsets)
    return Documents(batch.cu_seqlens, batch.max_seqlen, index, batch.cu_seqlens_kv, batch.max_seqlen_kv)
