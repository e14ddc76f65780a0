"""Which back end "auto" uses: the first one that passes a small trial on the device."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pite_kernels.attention import backends
from pite_kernels.attention.backends import Attend
from pite_kernels.attention.sdpa import batched_sdpa

log = logging.getLogger(__name__)

_KERNEL_DEVICES = ("cuda",)
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)

# Relative to the largest value. Half precision is off by 0.1 to 0.6%; a wrong mask, scale or order of heads by 20% and
# more.
_TOLERANCE = 0.05


class _Call(NamedTuple):
    """What a back end may support or not: the trial runs once for each."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    head_dim: int
    causal: bool
    deterministic: bool


# A plain dictionary with plain keys, the values of a _Call, so that torch.compile can read it.
_chosen: dict[tuple[torch.device, torch.dtype, int, int, int, bool, bool], str] = {}


def choose_backend(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, causal: bool = True
) -> str:
    """The name in BACKENDS that "auto" uses for such calls; "sdpa" for all but half precision on CUDA.

    On CUDA it is the first back end, in the order of `backends.by_preference`, whose small forward and backward pass
    agrees with SDPA; back ends that fail are logged with the reason. The trial runs once and waits for the device. The
    first forward pass of a model runs it. Call this function earlier if that first call would be inside a CUDA graph
    capture, or inside a backward pass: the trial's backward would wait for that pass.

    device  with its index
    """
    if device.type not in _KERNEL_DEVICES or dtype not in _KERNEL_DTYPES:
        return "sdpa"
    call = (device, dtype, heads, key_heads, head_dim, causal, torch.are_deterministic_algorithms_enabled())
    name = _chosen.get(call)
    if name is None:
        name = _chosen[call] = _choose(*call)
    return name


@torch.compiler.assume_constant_result
def _choose(*call: Any) -> str:
    # In a separate thread, so that no mode of the caller applies: no_grad, autocast, fake tensors, or activation
    # checkpointing, which would count the tensors that the trial saves as the layer's.
    device = call[0]
    start = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, "attention", start) as pool:
        return pool.submit(_first_that_works, _Call(*call)).result()


def _first_that_works(call: _Call) -> str:
    for name in backends.by_preference(call.device):
        try:
            attend = backends.load(name)
        except ValueError as error:
            absent = isinstance(error.__cause__, ModuleNotFoundError)
            log.log(logging.INFO if absent else logging.WARNING, "%s", error)
            continue
        reason = _trial_error(attend, call)
        if reason is None:
            log.info("packed_attention uses %s", name)
            return name
        log.warning("packed_attention skips %s: %s", name, reason)
    log.warning(
        "packed_attention found no varlen kernel and falls back to SDPA: "
        "each call copies the document boundaries to the host"
    )
    return "sdpa"


def _trial_error(attend: Attend, call: _Call) -> str | None:
    """Run a forward and backward pass over three documents; returns what is wrong with the back end, or None.

    The second is longer than a tile of any back end. The third continues it: its keys are the second's and its own.
    """
    device, dtype, heads, head_dim = call.device, call.dtype, call.heads, call.head_dim
    lengths, parts, scale = (33, 300, 95), (heads, call.key_heads, call.key_heads), 0.8 * head_dim**-0.5
    # A separate generator, so that the caller's random numbers do not change.
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    fused = normal(sum(lengths), sum(parts), head_dim).to(device, dtype)
    upstream = normal(sum(lengths), heads, head_dim).to(device, dtype)
    queries, keys = (0, 33, 333, 428), (0, 33, 333, 728)
    bounds, key_bounds = (torch.tensor(b, dtype=torch.int32, device=device) for b in (queries, keys))
    rows = torch.tensor([*range(333), *range(33, 428)], device=device)

    def results(function: Attend, dtype: torch.dtype) -> list[Tensor]:
        # q, k and v are slices of one fused tensor, as in a model.
        leaf = fused.to(dtype, copy=True).requires_grad_()
        _, k, v = leaf.index_select(0, rows).split(parts, 1)
        out = function(leaf[:, :heads], k, v, bounds, key_bounds, 300, 395, call.causal, scale)
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(dtype))
        return [out.detach(), *gradient.split(parts, 1)]

    expected = results(batched_sdpa, torch.float32)
    try:
        found = results(attend, dtype)
        if found[0].dtype != dtype or found[0].shape != expected[0].shape:
            return f"it returns {found[0].dtype} {tuple(found[0].shape)}"
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected)]
        again = results(attend, dtype) if call.deterministic else found
    except Exception as error:  # an unknown version of a back end may raise anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for name, relative_error in zip(("output", "gradient of q", "gradient of k", "gradient of v"), errors):
        if not relative_error <= _TOLERANCE:  # catches NaN too
            return f"its {name} is off by {relative_error:.0%}"
    if not all(torch.equal(a, b) for a, b in zip(found, again)):
        return "its results do not repeat, and torch.use_deterministic_algorithms is on"
    return None
