"""Gradients of what learns: a few flat buffers, each summed over the ranks as soon as backward has filled it.

Parameters' `.grad` are views of the buffers, so nothing is copied before or after a reduction. Buffers are reduced in a
fixed order, the order in which backward finishes them, on every rank alike; a rank whose parameter got no gradient
reduces the zeros that are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
_ALIGNMENT = 32
"""Float32 numbers, 128 bytes: what vectorised kernels want a tensor to start at."""


class Gradients:
    """Flat gradients of `parameters`, which come in the order in which backward finishes them.

    ranks  how many processes sum them; 1 for none
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: int, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets: list[Tensor] = []
        self._members: list[int] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        for group in _grouped(parameters, bucket_bytes):
            sizes = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in group]
            flat = torch.zeros(sum(sizes), dtype=group[0].dtype, device=group[0].device)
            for parameter, place in zip(group, flat.split(sizes)):
                parameter.grad = place[: parameter.numel()].view_as(parameter)
                self._bucket_of[parameter] = len(self._buckets)
            self._buckets.append(flat)
            self._members.append(len(group))
        self._ranks = ranks
        self._reducing = False
        self._waiting: list[int] = []
        self._works: list[dist.Work] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters if ranks > 1]

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._bucket_of:
            parameter.grad = None

    def zero(self) -> None:
        for flat in self._buckets:
            flat.zero_()

    def reduce_in_next_backward(self) -> None:
        """The next backward is the step's last: each buffer is summed over the ranks when it has filled it."""
        self._reducing = self._ranks > 1
        self._waiting = list(self._members)

    def finish(self, sums: Tensor) -> None:
        """Sum what is still to be summed, the step's numbers in `sums` too; the device waits for all of it, the host not."""
        if self._ranks == 1:
            return
        self._reducing = False
        while len(self._works) < len(self._buckets):
            self._launch()
        for work in [*self._works, dist.all_reduce(sums, async_op=True)]:
            work.wait()
        self._works.clear()

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._reducing:
            return
        self._waiting[self._bucket_of[parameter]] -= 1
        while len(self._works) < len(self._buckets) and self._waiting[len(self._works)] == 0:
            self._launch()

    def _launch(self) -> None:
        self._works.append(dist.all_reduce(self._buckets[len(self._works)], async_op=True))


def _grouped(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Neighbours of one dtype, up to `most` bytes together; a larger parameter is alone."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not groups or size + parameter.nbytes > most or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.nbytes
    return groups
