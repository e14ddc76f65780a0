"""The packed Llama decoder: T tokens of many documents in one row, with LoRA built in.

Projections that share an input are one fused weight (q,k,v and gate,up), so a layer is four large GEMMs. On disk they
have Hugging Face's separate names (`pite.names`).
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
    lora_a  (len(splits) * r, in_features) and lora_b (sum(splits), r) float32; None before `add_lora`
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
        self.lora_a = self.lora_b = None

    @torch.no_grad()
    def quantize(self) -> None:
        """Replace the weight by its float8 form. Merge earlier LoRAs before this, and add a LoRA before `forward`."""
        for name, tensor in quantize_weight(self.weight)._asdict().items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        del self.weight
        self.quantized = True

    def forward(self, x: Tensor) -> Tensor:
        weight = Fp8Weight(*(getattr(self, n) for n in Fp8Weight._fields)) if self.quantized else self.weight
        return lora_linear(x, weight, self.lora_a, self.lora_b, scale=self.scale, splits=self.splits)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU MLP.

    Input and output are the residual stream x (T, d) and a pending summand (T, d), which is added in the next norm: the
    addition and the norm are one fused kernel, forward and backward.
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
        self.checkpointed = False

    def forward(
        self, x: Tensor, added: Tensor | None, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        if not (self.checkpointed and torch.is_grad_enabled()):
            return self._compute(x, added, cos, sin, cu_seqlens, max_seqlen)
        # Activation checkpointing is inside forward, because FSDP's hooks have gathered the weights here. x and `added`
        # are summed first: saving one tensor takes half the memory of two.
        arguments = (x if added is None else x + added, None, cos, sin, cu_seqlens, max_seqlen)
        outputs = checkpoint(self._compute, *arguments, use_reentrant=False, preserve_rng_state=False)
        return cast("tuple[Tensor, Tensor]", outputs)

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
        # transformers' module supports every frequency scaling of a Llama config; it holds no weights.
        with torch.device("cpu"):
            self._rotary = [LlamaRotaryEmbedding(llm)]

    def checkpoint_activations(self, layers: int) -> None:
        """Use activation checkpointing in the first `layers` layers: keep only their input, recompute in backward."""
        for i, layer in enumerate(self.layers):
            cast(DecoderLayer, layer).checkpointed = i < layers

    def compile_layers(self) -> None:
        """Use torch.compile to fuse the elementwise operations of every layer, before and after its attention.

        Attention is not compiled: nothing fuses with it, and not every attention backend can be traced.
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
