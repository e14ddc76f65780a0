"""The processes of a run. One without torchrun; with it, data parallel: each rank takes its share of a global batch.

Frozen weights are copied to every rank, or sharded (FSDP2) where they do not fit. What learns is small and always
copied: its gradients are summed (`engine.distributed.gradients`), and rank 0 alone can save it, whatever the layout.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dataloaders.ranks import Ranks
from engine.distributed.watchdog import SET_UP, Watch, kept_by_torchrun
from pite import names

# What a decoder layer returns may be a view; the next one writes only to memory of its own.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

T = TypeVar("T")

BACKSTOP = 4
"""The process group's and NCCL's own timeouts, which name nobody, are this many times the watch's longest."""

NCCL_DUMP = 15
"""Seconds that torch's watchdog over NCCL gives a dump, its default. Four times that pass between an error, such as a lost
connection, and a C++ abort, which names nobody: more than our watch needs to speak first."""


@dataclass(frozen=True)
class World:
    """This process's place: its rank among `size`, and its device; `watch` looks after the others."""

    rank: int
    size: int
    device: torch.device
    watch: Watch | None = None

    @staticmethod
    def join(device: str | None = None, stall: float = 600.0) -> World:
        """Read torchrun's environment; join its process group, when there is one: gloo, and NCCL on CUDA.

        stall  seconds without progress after which a rank that the others wait for ends the run
        Raises ValueError where this rank's device is not there.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("--device cuda: no CUDA device is available here")
        ranks = Ranks.read()
        rank, size = ranks.rank, ranks.size
        if kind == "cuda":
            grow_segments()
            local, there = ranks.local, torch.cuda.device_count()
            if local >= there:
                raise ValueError(
                    f"this node has {there} CUDA device{'s' if there > 1 else ''} and none is left for its process {local + 1}: "
                    f"start at most {there} here (torchrun --nproc-per-node {there})"
                )
            kind = f"cuda:{local}"
            torch.cuda.set_device(kind)
        if size == 1:
            return World(rank, size, torch.device(kind))
        # torchrun's store is there before the process group: then a rank that never joins it is named too.
        watch = Watch(rank, size, stall, torch.device(kind)) if kept_by_torchrun() else None
        if not dist.is_initialized():
            on_gpu = kind.startswith("cuda")
            backstop = BACKSTOP * max(SET_UP, stall)
            os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(1000 * NCCL_DUMP))
            os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{backstop:.0f}")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                device_id=torch.device(kind) if on_gpu else None,
                timeout=timedelta(seconds=backstop),
            )
        watch = watch or Watch(rank, size, stall, torch.device(kind))
        watch.joined()
        return World(rank, size, torch.device(kind), watch)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; for work that is long and the same everywhere."""
        if self.size == 1:
            return make()
        shared = [make() if self.is_main else None]
        dist.broadcast_object_list(shared, src=0)
        return cast(T, shared[0])

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def doing(self, what: str) -> None:
        """What this rank is at, for the others should it stall there."""
        if self.watch is not None:
            self.watch.doing(what)

    def say(self, text: str) -> None:
        """Tell the user something once."""
        if self.is_main:
            print(text, file=sys.stderr)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def leave(self, alone_because: str | None = None) -> None:
        """Leave the process group: all ranks together, or this one alone for a reason that the others are told."""
        if self.watch is None:
            return
        if alone_because is None:
            self.barrier()
        self.watch.close(alone_because or "")
        if alone_because is None:
            dist.destroy_process_group()


def grow_segments() -> None:
    """Let CUDA's allocator grow its segments, before its first use: micro-batches differ in length, and fixed ones pile up."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def shard_frozen(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a decoder layer's frozen weights, or at last the rest of a model's, over all ranks (FSDP2).

    A layer's are gathered while it computes, forward and backward. Adapter, heads and LoRA stay whole on every rank.
    """
    from torch.distributed.fsdp import fully_shard

    whole = {p for name, p in module.named_parameters() if "lora_" in name or name.startswith(names.HEADS)}
    fully_shard(module, mesh=mesh, ignored_params=whole)
