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
        if config.choices.projector == "linear":
            self.vision_adapter = nn.Linear(config.vision_feature_size, hidden)
            self.localization_projector = nn.Linear(hidden, 2)
            self.trajectory_projector = nn.Linear(hidden, config.num_points * config.num_frames * 2)
        else:
            layers = nn.Linear(config.vision_feature_size, hidden), nn.GELU(), nn.Linear(hidden, hidden)
            self.mm_projector = nn.Sequential(*layers)
        if config.choices.marks:
            self.vid_edges = nn.Parameter(torch.empty(2, hidden))
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
        """Make the named modules of the family trainable, and freeze the others; a LoRA is always trainable."""
        for module in self.config.choices.modules:
            getattr(self, module).requires_grad_(module in modules)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def initialize_heads(self, seed: int) -> None:
        """Initialise the family's modules. Random numbers are drawn on the CPU, so they are the same on every device.

        Linear layers are initialised like `nn.Linear`. The coordinate heads start near the centre of the frame, because
        AdamW takes 0.5 / learning rate steps to move a bias there from 0. The embeddings of a video's marks start at 0;
        `pite.llava` has their values where there is a language model.
        """
        generator = torch.Generator().manual_seed(seed)
        own = [getattr(self, name) for name in self.config.choices.modules]
        for linear in (layer for module in own if isinstance(module, nn.Module) for layer in module.modules()):
            if isinstance(linear, nn.Linear):
                bound = 1 / math.sqrt(linear.in_features)
                for parameter in (linear.weight, linear.bias):
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        if self.config.choices.marks:
            self.vid_edges.zero_()
        if self.config.choices.projector != "linear":
            return
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
        """Input embeddings (T, d): token embeddings with projected features (F, C) at `feature_rows`."""
        projected, x = self.project(features), F.embedding(token_ids, self.decoder.embed_tokens)
        if self.config.video_tokens is not None:
            for token, edge in zip(self.config.video_tokens, self.vid_edges.to(self.dtype)):
                x = torch.where((token_ids == token)[:, None], edge, x)
        return x.index_copy(0, feature_rows, projected)

    def project(self, features: Tensor) -> Tensor:
        """Features (F, C) in the language model's embedding (F, d)."""
        x = features.to(self.dtype)
        if self.config.choices.projector == "linear":
            return self._linear(x, self.vision_adapter)
        first, _, last = self.mm_projector
        return self._linear(F.gelu(self._linear(x, cast(nn.Linear, first))), cast(nn.Linear, last))

    def _linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight.to(self.dtype), layer.bias.to(self.dtype))

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
