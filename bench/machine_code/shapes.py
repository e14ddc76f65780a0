"""The calls whose launches are compiled: PiTe's, PG-Video-LLaVA's, and those of users with awkward shapes.

The kernels are compiled for what they are launched with. The number of rows is arbitrary, and 600 outputs (three key
points, 100 frames), 200 and 1,000 are no multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from bench.machine_code.launches import Launch, recorded_launches
from pite_kernels import rope_qkv
from pite_kernels.fp8 import FP8, SMALLEST_ROW
from pite_kernels.gpu import cross_entropy, fp8, lora, trajectory
from pite_kernels.rows import RowIndex

HALF = (torch.bfloat16, torch.float16)
TYPES = (*HALF, torch.float32)
TOKENS, ROWS, FEW = 16_379, 4_093, 1_021  # arbitrary: divisible by no power of two


def call_trajectory(
    dtype: torch.dtype,
    outputs: int,
    *,
    rows: int = ROWS,
    depth: int = 4096,
    skip_absent: bool = True,
    accumulate: bool = True,
    stride: int | None = None,
    each: bool = False,
) -> None:
    hidden = torch.empty(TOKENS, stride or depth, dtype=dtype)[:, :depth]
    weight, bias = hidden.new_empty(outputs, depth), hidden.new_empty(outputs)
    targets = torch.empty(rows, 1, outputs // 2, 2)
    at = torch.empty(rows, dtype=torch.int64)
    _, sign, scale, _ = trajectory.forward(hidden, weight, bias, targets, at, None, skip_absent, each)
    gradient = hidden.new_empty(TOKENS, depth)
    trajectory.write_grad_hidden(gradient, scale, weight, sign, at, accumulate)
    trajectory.grad_weight(scale, hidden, weight, sign, at)


def call_cross_entropy(
    dtype: torch.dtype, vocabulary: int, *, with_rows: bool = True, smoothing: float = 0.1, each: bool = False
) -> None:
    hidden = torch.empty(ROWS if not with_rows else TOKENS, 4096, dtype=dtype)
    weight, ids = hidden.new_empty(vocabulary, 4096), torch.empty(ROWS, dtype=torch.int64)
    at = torch.empty(ROWS, dtype=torch.int64) if with_rows else None
    normalizer = torch.empty(())
    _, scale, dx, _, _, losses = cross_entropy.forward(
        hidden, weight, None, ids, at, normalizer, None, smoothing, -100, True, False, False
    )
    cross_entropy.scatter_rows(dx, at, losses if each else scale, len(hidden))


def call_lora(dtype: torch.dtype, splits: list[int], rank: int, *, odd_stride: bool = False) -> None:
    grad = torch.empty(TOKENS, sum(splits) + odd_stride, dtype=dtype)[:, : sum(splits)]
    lora.thin_products(grad, grad.new_empty(sum(splits), rank), grad.new_empty(TOKENS, len(splits) * rank), 2.0, splits)


def call_fp8(dtype: torch.dtype, width: int) -> None:
    fp8.quantize_rows(torch.empty(TOKENS, width, dtype=dtype), FP8, SMALLEST_ROW)


def call_rope(dtype: torch.dtype, head_dim: int, heads: int, key_heads: int) -> None:
    qkv = torch.empty(TOKENS, (heads + 2 * key_heads) * head_dim, dtype=dtype, requires_grad=True)
    tables = (torch.empty(TOKENS, head_dim, dtype=dtype) for _ in range(2))
    parts = rope_qkv(qkv * 1, *tables, head_dim=head_dim, key_heads=key_heads)
    torch.autograd.grad(parts, qkv, [torch.empty_like(part) for part in parts])


def call_shared_rope(dtype: torch.dtype, head_dim: int, heads: int, key_heads: int) -> None:
    """Keys and values are gathered, because samples share segments."""
    qkv = torch.empty(TOKENS, (heads + 2 * key_heads) * head_dim, dtype=dtype, requires_grad=True)
    tables = (torch.empty(TOKENS, head_dim, dtype=dtype) for _ in range(2))
    copies = torch.empty(TOKENS + ROWS, dtype=torch.int64)
    index = RowIndex(copies, torch.empty_like(copies), torch.empty(TOKENS + 1, dtype=torch.int64))
    parts = rope_qkv(qkv * 1, *tables, head_dim=head_dim, key_heads=key_heads, kv_rows=index)
    torch.autograd.grad(parts, qkv, [torch.empty_like(part) for part in parts])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CALLS: dict[str, Callable[[], None]] = {
    **{f"{name_of(d)}, 600 outputs": partial(call_trajectory, d, 600) for d in TYPES},
    "bfloat16, 600 outputs, from zero": partial(call_trajectory, torch.bfloat16, 600, accumulate=False),
    "bfloat16, 600 outputs, few rows": partial(call_trajectory, torch.bfloat16, 600, rows=FEW),
    **{f"bfloat16, {n} outputs": partial(call_trajectory, torch.bfloat16, n) for n in (2, 200, 1000)},
    "bfloat16, 600 outputs, losses one by one": partial(call_trajectory, torch.bfloat16, 600, each=True),
    "bfloat16, 600 outputs, odd stride": partial(call_trajectory, torch.bfloat16, 600, stride=4099, skip_absent=False),
    "bfloat16, 600 outputs, odd width": partial(call_trajectory, torch.bfloat16, 600, depth=4100),
    **{f"{name_of(d)}, vocabulary 32000": partial(call_cross_entropy, d, 32_000) for d in TYPES},
    "bfloat16, vocabulary 32000, losses one by one": partial(call_cross_entropy, torch.bfloat16, 32_000, each=True),
    "bfloat16, vocabulary 32003": partial(call_cross_entropy, torch.bfloat16, 32_003, with_rows=False),
    **{f"{name_of(d)}, q, k, v of rank 64": partial(call_lora, d, [4096] * 3, 64) for d in HALF},
    "bfloat16, gate, up of rank 64": partial(call_lora, torch.bfloat16, [11_008] * 2, 64),
    **{f"bfloat16, grouped q, k, v, rank {r}": partial(call_lora, torch.bfloat16, [4096, 512, 512], r) for r in (8, 128)},
    "bfloat16, q, k, v, odd stride": partial(call_lora, torch.bfloat16, [896, 128, 128], 16, odd_stride=True),
    **{f"{name_of(d)}, rows of 4096": partial(call_fp8, d, 4096) for d in TYPES},
    "bfloat16, rows of 11008": partial(call_fp8, torch.bfloat16, 11_008),
    **{f"{name_of(d)}, heads of 128": partial(call_rope, d, 128, 32, 32) for d in TYPES},
    "bfloat16, grouped heads of 64": partial(call_rope, torch.bfloat16, 64, 14, 2),
    "bfloat16, gathered heads of 128": partial(call_shared_rope, torch.bfloat16, 128, 32, 32),
    "bfloat16, gathered heads of 64": partial(call_shared_rope, torch.bfloat16, 64, 14, 2),
}  # fmt: skip
"""Name of the call -> a function that makes it."""


LEFT_OUT = (
    "float16",
    "float32, heads",
    "float32, rows",
    "bfloat16, 600 outputs, few rows",
    "bfloat16, 600 outputs, from zero",
    "bfloat16, 1000 outputs",
    "bfloat16, grouped q, k, v, rank 8",
    "bfloat16, gathered heads of 64",
)
TESTED = {name: call for name, call in CALLS.items() if not name.startswith(LEFT_OUT)}
"""The calls of the tests. The others take at most 188 of 255 registers, as the table shows."""


def all_launches(calls: Mapping[str, Callable[[], None]] = CALLS) -> dict[Launch, str]:
    """Every program that the calls compile -> the name of the first call that needs it."""
    found: dict[Launch, str] = {}
    for name, call in calls.items():
        with recorded_launches() as launches:
            call()
        for launch in launches:
            found.setdefault(launch, name)
    return found


def is_float8(launch: Launch) -> bool:
    """Whether a program needs sm_89."""
    return any(kind == "*fp8e4nv" for _, kind in launch.types)
