"""Gradients of the trainable parameters in a few flat buckets; each is all-reduced as soon as backward has filled it.

Each parameter's `.grad` is a view of its bucket, so nothing is copied before or after an all-reduce. All ranks reduce
the buckets in the same fixed order, the order in which backward finishes them. Where a parameter got no gradient, zeros
are reduced. In bfloat16 the network carries half the bytes; each rank's sum and the optimizer stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
_ALIGNMENT = 32
"""In float32 numbers, 128 bytes: vectorised kernels need tensors that start at a multiple of it."""


class Gradients:
    """Flat gradients of `parameters`, given in the order in which backward finishes them.

    ranks         number of processes that sum them; with 1 nothing is reduced
    reduce_dtype  dtype of the all-reduce; None for that of the gradients
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        ranks: int,
        bucket_bytes: int = BUCKET_BYTES,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self._buckets: list[Tensor] = []
        self._reduce_dtype = reduce_dtype
        self._reduced: list[Tensor] = []
        self._members: list[int] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        for group in _buckets_of(parameters, bucket_bytes):
            sizes = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in group]
            flat = torch.zeros(sum(sizes), dtype=group[0].dtype, device=group[0].device)
            for parameter, place in zip(group, flat.split(sizes)):
                parameter.grad = place[: parameter.numel()].view_as(parameter)
                self._bucket_of[parameter] = len(self._buckets)
            self._buckets.append(flat)
            self._members.append(len(group))
        self._ranks = ranks
        self._reducing = False
        self._not_ready: list[int] = []
        self._works: list[dist.Work] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient_ready) for p in parameters if ranks > 1]

    def close(self) -> None:
        """Remove the hooks and the parameters' gradients."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._bucket_of:
            parameter.grad = None

    def zero(self) -> None:
        for flat in self._buckets:
            flat.zero_()

    def reduce_in_next_backward(self) -> None:
        """Call before the step's last backward, which then all-reduces each bucket as soon as it has filled it."""
        self._reducing = self._ranks > 1
        self._not_ready = list(self._members)

    def finish(self, sums: Tensor) -> None:
        """All-reduce the remaining buckets and the step's numbers in `sums`. The device waits, the host does not."""
        if self._ranks == 1:
            return
        self._reducing = False
        while len(self._works) < len(self._buckets):
            self._start_all_reduce()
        for work in [*self._works, dist.all_reduce(sums, async_op=True)]:
            work.wait()
        for bucket, reduced in zip(self._buckets, self._reduced):
            if reduced is not bucket:
                bucket.copy_(reduced)
        self._works.clear()
        self._reduced.clear()

    def _on_gradient_ready(self, parameter: nn.Parameter) -> None:
        if not self._reducing:
            return
        self._not_ready[self._bucket_of[parameter]] -= 1
        while len(self._works) < len(self._buckets) and self._not_ready[len(self._works)] == 0:
            self._start_all_reduce()

    def _start_all_reduce(self) -> None:
        bucket = self._buckets[len(self._works)]
        self._reduced.append(bucket if self._reduce_dtype is None else bucket.to(self._reduce_dtype))
        self._works.append(dist.all_reduce(self._reduced[-1], async_op=True))


def _buckets_of(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Groups of neighbours of one dtype, up to `most` bytes together; a larger parameter has a bucket of its own."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not groups or size + parameter.nbytes > most or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.nbytes
    return groups
