"""The packed Llama decoder: T tokens of many documents in one row, LoRA built in.

Projections that share an input are one weight (q,k,v and gate,up), so a layer is four large GEMMs; on disk they carry
Hugging Face's separate names (`pite.names`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pite.config import PiTeConfig
from pite_kernels import Fp8Weight, lora_linear, packed_attention, quantize_weight, rms_norm, rope_qkv, swiglu


class LoRALinear(nn.Module):
    """A frozen linear layer of one or more projections of the same input, each with its own LoRA (Hu et al. 2021).

    weight  (sum(splits), in_features) frozen; `quantize` replaces it by the four tensors of a `pite_kernels.Fp8Weight`
    lora_a  (len(splits) * r, in_features) and lora_b (sum(splits), r) float32, once `add_lora` was called
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, in_features: int, splits: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.splits = splits
        self.weight = nn.Parameter(torch.empty(sum(splits), in_features, dtype=dtype), requires_grad=False)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.scale = 1.0
        self.quantized = False

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
        """weight + scale * B A of every part, summed in float32; the weight itself when there is no LoRA."""
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
        self.lora_a = self.lora_b = None

    @torch.no_grad()
    def quantize(self) -> None:
        """Keep the weight in float8 alone. What is merged is merged before; a LoRA is added before it computes."""
        for name, tensor in quantize_weight(self.weight)._asdict().items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        del self.weight
        self.quantized = True

    def forward(self, x: Tensor) -> Tensor:
        weight = Fp8Weight(*(getattr(self, n) for n in Fp8Weight._fields)) if self.quantized else self.weight
        return lora_linear(x, weight, self.lora_a, self.lora_b, scale=self.scale, splits=self.splits)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU MLP: from a stream (T, d) and what is to be added to it, (T, d), to the next two.

    The addition waits for the norm that follows it, with which it is one kernel, forward and backward.
    """

    def __init__(self, config: PiTeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        llm = config.llm
        self.eps = llm.rms_norm_eps
        self.head_dim, self.key_heads = config.head_dim, llm.num_key_value_heads
        queries = llm.num_attention_heads * config.head_dim
        keys = self.key_heads * config.head_dim
        self.input_norm = nn.Parameter(torch.empty(llm.hidden_size, dtype=dtype), requires_grad=False)
        self.post_attention_norm = nn.Parameter(torch.empty(llm.hidden_size, dtype=dtype), requires_grad=False)
        self.qkv = LoRALinear(llm.hidden_size, (queries, keys, keys), dtype)
        self.o = LoRALinear(queries, (llm.hidden_size,), dtype)
        self.gate_up = LoRALinear(llm.hidden_size, (llm.intermediate_size, llm.intermediate_size), dtype)
        self.down = LoRALinear(llm.intermediate_size, (llm.hidden_size,), dtype)
        self.recompute = False

    def forward(
        self, x: Tensor, added: Tensor | None, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        if not (self.recompute and torch.is_grad_enabled()):
            return self._compute(x, added, cos, sin, cu_seqlens, max_seqlen)
        # Recomputed in the backward pass: inside forward, where FSDP's hooks have gathered the weights. One input is
        # kept, where the two would take twice the memory.
        arguments = (x if added is None else x + added, None, cos, sin, cu_seqlens, max_seqlen)
        again = checkpoint(self._compute, *arguments, use_reentrant=False, preserve_rng_state=False)
        return cast("tuple[Tensor, Tensor]", again)

    def linear_layers(self) -> tuple[LoRALinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def _compute(
        self, x: Tensor, added: Tensor | None, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        x, q, k, v = self._before(x, added, cos, sin)
        return self._after(x, packed_attention(q, k, v, cu_seqlens, max_seqlen))

    def _before(
        self, x: Tensor, added: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if added is None:
            normed = rms_norm(x, self.input_norm, eps=self.eps)
        else:
            normed, x = rms_norm(added, self.input_norm, eps=self.eps, residual=x)
        return x, *rope_qkv(self.qkv(normed), cos, sin, head_dim=self.head_dim, key_heads=self.key_heads)

    def _after(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        normed, x = rms_norm(self.o(attended.flatten(-2)), self.post_attention_norm, eps=self.eps, residual=x)
        return x, self.down(swiglu(self.gate_up(normed)))


class Decoder(nn.Module):
    """Embedding table, layers and final norm of a Llama-architecture language model."""

    def __init__(self, config: PiTeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        llm = config.llm
        self.eps = llm.rms_norm_eps
        self.embed_tokens = nn.Parameter(torch.empty(llm.vocab_size, llm.hidden_size, dtype=dtype), requires_grad=False)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype) for _ in range(llm.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(llm.hidden_size, dtype=dtype), requires_grad=False)
        # transformers' own module knows every frequency scaling that a Llama config can name; it holds no weights.
        with torch.device("cpu"):
            self._rotary = [LlamaRotaryEmbedding(llm)]

    def recompute(self, layers: int) -> None:
        """Keep no activations of the first `layers` layers but their input; backward computes them again."""
        for i, layer in enumerate(self.layers):
            cast(DecoderLayer, layer).recompute = i < layers

    def compile_layers(self) -> None:
        """Have torch.compile fuse the elementwise work of every layer, before its attention and after it.

        Attention stays outside: nothing fuses with it, and not every back end of it can be traced.
        """
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

    def forward(self, x: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Final-norm hidden states (T, d) of the packed input embeddings x (T, d)."""
        cos, sin = self.rotary(position_ids, x.dtype)
        x, added = self.layers[0](x, None, cos, sin, cu_seqlens, max_seqlen)
        for layer in self.layers[1:]:
            x, added = layer(x, added, cos, sin, cu_seqlens, max_seqlen)
        return rms_norm(added, self.norm, eps=self.eps, residual=x)[0]
