"""The packed decoder: T tokens of many documents in one row, with LoRA built in.

It computes Llama's layers. What other architectures add is data in the configuration (`pite.architectures`): biases of
q, k, v, and norms of q's and k's heads. Projections that share an input are one fused weight (q,k,v and gate,up), so a
layer is four large GEMMs. On disk they have Hugging Face's separate names (`pite.names`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pite.config import PiTeConfig
from pite_kernels import (
    Fp8Weight,
    RowIndex,
    lora_linear,
    packed_attention,
    put_rows,
    quantize_weight,
    rms_norm,
    rope_kv,
    rope_q,
    rope_qkv,
    swiglu,
    take_rows,
)


class LoRALinear(nn.Module):
    """A frozen linear layer of one or more projections of the same input, each with its own LoRA (Hu et al. 2021).

    weight  (sum(splits), in_features) frozen; `quantize` replaces it by the four tensors of a `pite_kernels.Fp8Weight`
    bias    (sum(splits),) frozen, or None
    lora_a  (len(splits) * r, in_features) and lora_b (sum(splits), r) float32; None before `add_lora`
    cast    the two in the dtype of the activations, from `PiTe.cast_lora`; None: every call casts them
    """

    bias: nn.Parameter | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    cast: tuple[Tensor, Tensor] | None

    def __init__(self, in_features: int, splits: tuple[int, ...], dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.splits = splits
        self.weight = _frozen(sum(splits), in_features, dtype=dtype)
        self.register_parameter("bias", _frozen(sum(splits), dtype=dtype) if bias else None)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.scale = 1.0
        self.quantized = False
        self.cast = None

    def add_lora(self, rank: int, alpha: float, generator: torch.Generator | None) -> None:
        """Start a new LoRA: A uniform in +-1/sqrt(in_features) as PEFT initialises it, B zero."""
        assert self.lora_a is None, "merge the previous LoRA first"
        device, in_features = self.weight.device, self.weight.shape[1]
        a = torch.empty(len(self.splits) * rank, in_features)
        if not self.weight.is_meta:
            bound = 1 / math.sqrt(in_features)
            a.uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(sum(self.splits), rank, device=device))
        self.scale = alpha / rank

    @torch.no_grad()
    def merged(self) -> Tensor:
        """weight + scale * B A of every part, summed in float32; without a LoRA the weight itself."""
        assert not self.quantized, "the weight's own values are gone"
        if self.lora_a is None or self.lora_b is None:
            return self.weight.data
        updates = [
            b.float() @ a.float() for a, b in zip(self.lora_a.chunk(len(self.splits)), self.lora_b.split(self.splits))
        ]
        return (self.weight.float() + self.scale * torch.cat(updates)).to(self.weight.dtype)

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Fold the LoRA into the weight and drop it."""
        self.weight.copy_(self.merged())
        self.lora_a = self.lora_b = self.cast = None

    def casts(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """`cast`, in memory that this allocates the first time, each with the parameter that it has to equal.

        Empty without a LoRA, or for float32, which needs no cast.
        """
        if self.lora_a is None or self.lora_b is None or dtype == torch.float32:
            return []
        if self.cast is None:
            self.cast = torch.empty_like(self.lora_a, dtype=dtype), torch.empty_like(self.lora_b, dtype=dtype)
        return list(zip(self.cast, (self.lora_a, self.lora_b)))

    @torch.no_grad()
    def quantize(self) -> None:
        """Replace the weight by its float8 form. Merge earlier LoRAs before this, and add a LoRA before `forward`."""
        for name, tensor in quantize_weight(self.weight)._asdict().items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        del self.weight
        self.quantized = True

    def forward(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """The projections `first` to `last` (not included) of x (T, in_features), one after the other."""
        weight: Tensor | Fp8Weight = self._fp8_weight() if self.quantized else self.weight
        bias: Tensor | None = self.bias
        a: Tensor | None = self.lora_a
        b: Tensor | None = self.lora_b
        cast = self.cast
        splits = self.splits[first:last]
        if splits != self.splits:
            begin = sum(self.splits[:first])
            outputs = slice(begin, begin + sum(splits))
            if isinstance(weight, Fp8Weight):
                columns = weight.columns[:, outputs].contiguous()
                weight = Fp8Weight(weight.rows[outputs], weight.row_scales[outputs], columns, weight.column_scales)
            else:
                weight = weight[outputs]
            bias = None if bias is None else bias[outputs]
            if a is not None and b is not None:
                inputs = slice(first * b.shape[1], (first + len(splits)) * b.shape[1])
                a, b = a[inputs], b[outputs]
                cast = None if cast is None else (cast[0][inputs], cast[1][outputs])
        return lora_linear(x, weight, a, b, scale=self.scale, splits=splits, bias=bias, cast=cast)

    def _fp8_weight(self) -> Fp8Weight:
        return Fp8Weight(*(getattr(self, name) for name in Fp8Weight._fields))


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Documents(NamedTuple):
    """Which rows attend to which: segments of rows, and the rows of k and v of each where it continues another.

    cu_seqlens, max_seqlen        (G + 1,) int32 boundaries of the segments, and the longest
    kv_rows                       each segment's ancestors' rows, then its own; None: each attends to itself
    cu_seqlens_kv, max_seqlen_kv  (G + 1,) int32 boundaries in kv_rows, and the longest
    """

    cu_seqlens: Tensor
    max_seqlen: int
    kv_rows: RowIndex | None = None
    cu_seqlens_kv: Tensor | None = None
    max_seqlen_kv: int | None = None


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU MLP.

    Input and output are the residual stream x (T, d) and a pending summand (T, d), which is added in the next norm: the
    addition and the norm are one fused kernel, forward and backward.

    q_norm, k_norm  (head_dim,) weights of the norms of q's and k's heads, or None
    """

    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(self, config: PiTeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        llm, architecture = config.llm, config.architecture
        self.eps = llm.rms_norm_eps
        self.head_dim, self.key_heads = config.head_dim, llm.num_key_value_heads
        queries = llm.num_attention_heads * config.head_dim
        keys = self.key_heads * config.head_dim
        self.input_norm = _frozen(llm.hidden_size, dtype=dtype)
        self.post_attention_norm = _frozen(llm.hidden_size, dtype=dtype)
        for name in ("q_norm", "k_norm"):
            self.register_parameter(name, _frozen(config.head_dim, dtype=dtype) if architecture.qk_norm else None)
        self.qkv = LoRALinear(llm.hidden_size, (queries, keys, keys), dtype, bias=architecture.qkv_bias)
        self.o = LoRALinear(queries, (llm.hidden_size,), dtype)
        self.gate_up = LoRALinear(llm.hidden_size, (llm.intermediate_size, llm.intermediate_size), dtype)
        self.down = LoRALinear(llm.intermediate_size, (llm.hidden_size,), dtype)
        self.checkpointed = False

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        documents: Documents,
        read_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """With `read_rows` (R,) the results are of these rows alone: all others are computed up to their k and v."""
        if not (self.checkpointed and torch.is_grad_enabled()):
            return self._compute(x, added, cos, sin, documents, read_rows)
        # Activation checkpointing is inside forward, because FSDP's hooks have gathered the weights here. x and `added`
        # are summed first: saving one tensor takes half the memory of two.
        arguments = (x if added is None else x + added, None, cos, sin, documents, read_rows)
        outputs = checkpoint(self._compute, *arguments, use_reentrant=False, preserve_rng_state=False)
        return cast("tuple[Tensor, Tensor]", outputs)

    def linear_layers(self) -> tuple[LoRALinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def _compute(
        self,
        x: Tensor,
        added: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        documents: Documents,
        read_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, q, k, v = self._before(x, added, cos, sin, documents.kv_rows, read_rows)
        # Attention's mask needs the queries of a segment without gaps; it is a small part of a layer.
        if read_rows is not None:
            q = put_rows(q, read_rows, cos.shape[0])
        attended = packed_attention(
            q,
            k,
            v,
            documents.cu_seqlens,
            documents.max_seqlen,
            cu_seqlens_kv=documents.cu_seqlens_kv,
            max_seqlen_kv=documents.max_seqlen_kv,
        )
        return self._after(x, attended if read_rows is None else take_rows(attended, read_rows))

    def _before(
        self,
        x: Tensor,
        added: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        kv_rows: RowIndex | None,
        read_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if added is None:
            normed = rms_norm(x, self.input_norm, eps=self.eps)
        else:
            normed, x = rms_norm(added, self.input_norm, eps=self.eps, residual=x)
        head_dim, eps, norms = self.head_dim, self.eps, self._head_norms()
        if read_rows is None:
            qkv, heads = self.qkv(normed), self.key_heads
            return x, *rope_qkv(
                qkv, cos, sin, head_dim=head_dim, key_heads=heads, kv_rows=kv_rows, norms=norms, eps=eps
            )
        q_norm, k_norm = norms or (None, None)
        k, v = rope_kv(self.qkv(normed, 1), cos, sin, head_dim=head_dim, kv_rows=kv_rows, norm=k_norm, eps=eps)
        q = self.qkv(take_rows(normed, read_rows), 0, 1)
        cos, sin = cos.index_select(0, read_rows), sin.index_select(0, read_rows)
        q = rope_q(q, cos, sin, head_dim=head_dim, norm=q_norm, eps=eps)
        return take_rows(x, read_rows), q, k, v

    def _head_norms(self) -> tuple[Tensor, Tensor] | None:
        return None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def _after(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        normed, x = rms_norm(self.o(attended.flatten(-2)), self.post_attention_norm, eps=self.eps, residual=x)
        return x, self.down(swiglu(self.gate_up(normed)))


class Decoder(nn.Module):
    """Embedding table, layers and final norm of a language model."""

    def __init__(self, config: PiTeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        llm = config.llm
        self.eps = llm.rms_norm_eps
        self.embed_tokens = _frozen(llm.vocab_size, llm.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype) for _ in range(llm.num_hidden_layers))
        self.norm = _frozen(llm.hidden_size, dtype=dtype)
        # transformers' module supports every frequency scaling of a configuration, and holds no weights. Those of the
        # other architectures compute the same.
        with torch.device("cpu"):
            self._rotary = [LlamaRotaryEmbedding(cast("LlamaConfig", llm))]

    def checkpoint_activations(self, layers: int) -> None:
        """Use activation checkpointing in the first `layers` layers: keep only their input, recompute in backward."""
        for i, layer in enumerate(self.layers):
            cast(DecoderLayer, layer).checkpointed = i < layers

    def compile_layers(self) -> None:
        """Use torch.compile to fuse the elementwise operations of every layer, before and after its attention.

        Attention is not compiled: nothing fuses with it, and not every attention backend can be traced.

        All layers share a program for each kind of call: the first layer or a later one, all rows or the read ones, shared
        prefixes or none, fixed or varying lengths, with gradients or without (validation). That is more than Dynamo's
        default of eight, after which it raises.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in cast("Iterator[DecoderLayer]", self.layers):
            layer._before = torch.compile(layer._before, fullgraph=True)  # type: ignore[method-assign]
            layer._after = torch.compile(layer._after, fullgraph=True)  # type: ignore[method-assign]

    @property
    def rotary_embedding(self) -> LlamaRotaryEmbedding:
        return self._rotary[0]

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, head_dim) of the rotary embedding at the given positions."""
        rotary = self.rotary_embedding.to(position_ids.device)
        like = torch.empty(0, dtype=dtype, device=position_ids.device)
        cos, sin = rotary(like, position_ids[None])
        return cos[0], sin[0]

    def forward(self, x: Tensor, position_ids: Tensor, documents: Documents, read_rows: Tensor | None = None) -> Tensor:
        """Final-norm hidden states of the packed input embeddings x (T, d): (T, d), or of `read_rows` (R,) only."""
        cos, sin = self.rotary(position_ids, x.dtype)
        added = None
        for layer in self.layers[:-1]:
            x, added = layer(x, added, cos, sin, documents)
        x, added = self.layers[-1](x, added, cos, sin, documents, read_rows)
        return rms_norm(added, self.norm, eps=self.eps, residual=x)[0]
