"""Every kernel once, forward and backward, on the rows and shapes of a real micro-batch, against plain PyTorch.

The bar is that of the tests: against float64, at most twice the error of plain PyTorch in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pite_kernels
from bench.measure import find_sync, gate
from bench.step.problem import RECIPE, Shape, Workload
from dataloaders.errors import reason
from pite_kernels import RowIndex, reference
from pite_kernels.fp8 import dequantize, quantize_rows, why_unsupported

Function = Callable[..., Any]
RANK, SCALE = RECIPE.lora_rank, 2.0


@dataclass(frozen=True)
class Check:
    """An operation, ours and in plain PyTorch: functions of the same tensors.

    learned  tensors whose gradients are compared
    fixed    further tensors, without gradients
    plain    also runs in float64
    """

    learned: tuple[Tensor, ...]
    fixed: tuple[Any, ...]
    ours: Function
    plain: Function

    def run(self, function: Function, wide: bool = False) -> list[Tensor]:
        """The results of a function and the gradients for random upstream ones; `wide`: in float64."""
        # Copies, because backward may overwrite what forward has saved.
        learned = [(t.double() if wide else t.clone()).requires_grad_() for t in self.learned]
        results = function(*learned, *(_wide(t) if wide else t for t in self.fixed))
        results = [results] if isinstance(results, Tensor) else list(results)
        # Rounded to what every dtype holds.
        upstream = [_normal(tuple(r.shape), r.device, 100 + i).bfloat16().to(r.dtype) for i, r in enumerate(results)]
        return [*results, *torch.autograd.grad(results, learned, upstream)]


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _normal(shape: tuple[int, ...], device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed)) * scale


class Shapes:
    """Random tensors of a model's shapes for one of its micro-batches."""

    def __init__(self, shape: Shape, work: Workload, device: torch.device, dtype: torch.dtype) -> None:
        self.llm, self.config = shape.config.llm, shape.config
        self.batch = max(work.batches(), key=lambda batch: batch.num_rows).to(device)
        self.device, self.dtype = device, dtype

    def rows(self, *shape: int, seed: int = 0) -> Tensor:
        return _normal(shape, self.device, seed).to(self.dtype)

    def weight(self, outputs: int, inputs: int, seed: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        return _normal((outputs, inputs), self.device, seed, inputs**-0.5).to(dtype or self.dtype)

    @property
    def documents(self) -> dict[str, Any]:
        """How the segments attend to each other, for `packed_attention`."""
        batch, index = self.batch, self.row_index
        if index is None:
            return {}
        return {"kv_rows": index, "cu_seqlens_kv": batch.cu_seqlens_kv, "max_seqlen_kv": batch.max_seqlen_kv}

    @property
    def row_index(self) -> RowIndex | None:
        batch = self.batch
        if batch.kv_rows is None or batch.kv_inverse is None or batch.kv_offsets is None:
            return None
        return RowIndex(batch.kv_rows, batch.kv_inverse, batch.kv_offsets)


def norm(s: Shapes) -> Check:
    """The sum with the residual, and its norm."""
    tokens, hidden = s.batch.num_rows, s.llm.hidden_size
    learned = s.rows(tokens, hidden), s.rows(tokens, hidden, seed=1)
    weight = 1 + 0.1 * s.rows(hidden, seed=2)

    def run(function: Function) -> Function:
        return lambda x, residual, weight: function(x, weight, eps=s.llm.rms_norm_eps, residual=residual)

    return Check(learned, (weight,), run(pite_kernels.rms_norm), run(reference.rms_norm))


def lora(s: Shapes, inputs: int, splits: tuple[int, ...]) -> Check:
    a, b = _lora_factors(s, inputs, splits)

    def ours(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return pite_kernels.lora_linear(x, weight, a, b, scale=SCALE, splits=splits)

    def plain(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return reference.lora_linear(x, weight, a.to(x.dtype), b.to(x.dtype), scale=SCALE, splits=splits)

    x, weight = s.rows(s.batch.num_rows, inputs), s.weight(sum(splits), inputs)
    return Check((x, a, b), (weight,), ours, plain)


def _lora_factors(s: Shapes, inputs: int, splits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A and B in float32, as in training."""
    a = s.weight(len(splits) * RANK, inputs, seed=2, dtype=torch.float32)
    return a, s.weight(sum(splits), RANK, seed=3, dtype=torch.float32)


def lora_fp8(s: Shapes) -> Check:
    """The plain one multiplies the float8 numbers, which it quantizes on the CPU, in its own dtype."""
    if why := why_unsupported(s.device):
        raise ValueError(why)
    hidden = s.llm.hidden_size
    splits = (hidden,) * 3
    a, b = _lora_factors(s, hidden, splits)
    quantized = pite_kernels.quantize_weight(s.weight(3 * hidden, hidden))

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return pite_kernels.lora_linear(x, quantized, a, b, scale=SCALE, splits=splits)

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        nothing = x.new_zeros(3 * hidden, hidden)
        low = reference.lora_linear(x, nothing, a.to(x.dtype), b.to(x.dtype), scale=SCALE, splits=splits)
        factors = quantized.rows, quantized.row_scales, quantized.columns, quantized.column_scales
        return low + _Float8Product.apply(x, s.dtype, *factors)

    return Check((s.rows(s.batch.num_rows, hidden), a, b), (), ours, plain)


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *factors: Tensor) -> Tensor:
        ctx.dtype, ctx.factors = dtype, factors
        return _multiply(x, dtype, *factors[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _multiply(grads[0], ctx.dtype, *ctx.factors[2:]), None, None, None, None, None


def _multiply(x: Tensor, dtype: torch.dtype, matrix: Tensor, scales: Tensor) -> Tensor:
    """The product of float8 numbers; x is rounded to `dtype` first, as the activations are."""
    rounded = dequantize(*quantize_rows(x.to(dtype).cpu())).to(x)
    return rounded @ dequantize(matrix, scales).to(x).t()


def rope(s: Shapes) -> Check:
    """Rotation, and the copies of the keys and values that samples share."""
    heads, keys, size = s.llm.num_attention_heads, s.llm.num_key_value_heads, s.config.head_dim
    cos, sin = pite_kernels.rope_tables(s.batch.position_ids, size, dtype=s.dtype)
    index = s.row_index

    def ours(qkv: Tensor, cos: Tensor, sin: Tensor) -> Any:
        # It overwrites its input.
        return pite_kernels.rope_qkv(qkv * 1, cos, sin, head_dim=size, key_heads=keys, kv_rows=index)

    def plain(qkv: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k, v = qkv.unflatten(-1, (-1, size)).split([heads, keys, keys], 1)
        q, k = reference.apply_rope(q, k, cos, sin)
        return (q, k, v) if index is None else (q, k[index.rows], v[index.rows])

    qkv = s.rows(s.batch.num_rows, (heads + 2 * keys) * size)
    return Check((qkv,), (cos, sin), ours, plain)


def attention(s: Shapes) -> Check:
    heads, keys, size, batch = s.llm.num_attention_heads, s.llm.num_key_value_heads, s.config.head_dim, s.batch
    shapes = [(batch.num_rows, count, size) for count in (heads, keys, keys)]

    def run(function: Function) -> Function:
        return lambda q, k, v: function(q, k, v, batch.cu_seqlens, batch.max_seqlen, **s.documents)

    learned = tuple(s.rows(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return Check(learned, (), run(pite_kernels.packed_attention), run(reference.packed_attention))


def activation(s: Shapes) -> Check:
    def plain(both: Tensor) -> Tensor:
        return reference.swiglu(*both.chunk(2, -1))

    learned = (s.rows(s.batch.num_rows, 2 * s.llm.intermediate_size),)
    return Check(learned, (), pite_kernels.swiglu, plain)


def _hidden(s: Shapes) -> Tensor:
    """The rows that the heads read."""
    return s.rows(len(s.batch.read_rows), s.llm.hidden_size)


def _trajectory_head(s: Shapes) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and targets; these are at a distance from the predictions, so that rounding changes no sign."""
    outputs = s.config.num_points * s.config.num_frames * 2
    weight = s.weight(outputs, s.llm.hidden_size, seed=4, dtype=torch.float32) * 0.1
    bias = _normal((outputs,), s.device, 5, 0.1)
    targets = torch.where(s.batch.trajectory == -1, -1.0, s.batch.trajectory + 2)
    return weight, bias, targets


def trajectory(s: Shapes) -> Check:
    weight, bias, targets = _trajectory_head(s)

    def run(function: Function) -> Function:
        return lambda hidden, weight, bias, targets: function(hidden, weight, bias, targets, s.batch.trajectory_rows)

    learned = _hidden(s), weight, bias
    return Check(learned, (targets,), run(pite_kernels.trajectory_l1), run(reference.trajectory_l1))


def cross_entropy(s: Shapes) -> Check:
    batch = s.batch

    def run(function: Function) -> Function:
        return lambda hidden, weight: function(hidden, weight, batch.target_ids, batch.target_rows, label_smoothing=0.1)

    ours, plain = run(pite_kernels.linear_cross_entropy), run(reference.linear_cross_entropy)
    return Check((_hidden(s),), (s.weight(s.llm.vocab_size, s.llm.hidden_size),), ours, plain)


def two_heads(s: Shapes) -> Check:
    """Both losses of the same rows, as in stage 2."""
    batch = s.batch
    head, bias, targets = _trajectory_head(s)

    def run(function: Function) -> Function:
        def losses(hidden: Tensor, head: Tensor, bias: Tensor, vocabulary: Tensor, targets: Tensor) -> Tensor:
            total, *_ = function(
                hidden,
                vocabulary,
                batch.target_ids,
                batch.target_rows,
                head,
                bias,
                targets,
                batch.trajectory_rows,
                label_smoothing=0.1,
                weight=1.0,
                normalizers=(None, None),
            )
            return total

        return losses

    fixed = s.weight(s.llm.vocab_size, s.llm.hidden_size), targets
    ours, plain = run(pite_kernels.two_head_loss), run(reference.two_head_loss)
    return Check((_hidden(s), head, bias), fixed, ours, plain)


CHECKS: dict[str, Callable[[Shapes], Check]] = {
    "norm": norm,
    "LoRA: q, k, v": lambda s: lora(s, s.llm.hidden_size, (s.llm.hidden_size,) * 3),
    "LoRA: o": lambda s: lora(s, s.llm.hidden_size, (s.llm.hidden_size,)),
    "LoRA: gate, up": lambda s: lora(s, s.llm.hidden_size, (s.llm.intermediate_size,) * 2),
    "LoRA: down": lambda s: lora(s, s.llm.intermediate_size, (s.llm.hidden_size,)),
    "LoRA: q, k, v in float8": lora_fp8,
    "rotary embedding": rope,
    "attention": attention,
    "SwiGLU": activation,
    "trajectory L1": trajectory,
    "cross-entropy": cross_entropy,
    "both heads": two_heads,
}
"""Name -> a function that makes the check's tensors."""


def result(name: str, shapes: Shapes) -> dict[str, Any]:
    """The record of a check: what is wrong and what synchronizes, each None if nothing does.

    A check that raises is wrong, with the reason.
    """
    try:
        check = CHECKS[name](shapes)
        wrong = gate(check.run(check.ours), check.run(check.plain), check.run(check.plain, wide=True))
        waits = find_sync(lambda: check.run(check.ours), shapes.device)
    except Exception as error:  # the others go on
        return {"check": name, "wrong": f"{type(error).__name__}: {reason(error)}", "synchronizes": None}
    return {"check": name, "wrong": wrong, "synchronizes": waits}
