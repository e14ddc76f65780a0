"""The processes of a run. One without torchrun; gradients of what learns are summed, since losses are normalised globally."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place: its rank among `size`, and its device."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(device: str | None = None) -> World:
        """Read torchrun's environment; join its process group (NCCL on CUDA, gloo elsewhere) when there is one."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("--device cuda: no CUDA device is available here")
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if kind == "cuda":
            kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(kind)
        if size > 1 and not dist.is_initialized():
            on_gpu = kind.startswith("cuda")
            dist.init_process_group("nccl" if on_gpu else "gloo", device_id=torch.device(kind) if on_gpu else None)
        return World(int(os.environ.get("RANK", "0")), size, torch.device(kind))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_gradients(self, parameters: list[nn.Parameter], sums: Tensor) -> None:
        """Add up gradients, and the loss numbers in `sums`, over all ranks: one flat reduction in float32."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        flat = torch.cat([sums, *(p.grad.flatten() for p in parameters if p.grad is not None)])
        dist.all_reduce(flat)
        sums.copy_(flat[: len(sums)])
        offset = len(sums)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; for work that is long and the same everywhere."""
        if self.size == 1:
            return make()
        shared = [make() if self.is_main else None]
        dist.broadcast_object_list(shared, src=0)
        return cast(T, shared[0])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the process group, all ranks together."""
        if self.size > 1:
            dist.destroy_process_group()
