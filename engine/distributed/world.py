"""The processes of a run: one without torchrun, and data parallel with it. Each rank takes its share of a global batch.

Frozen weights are copied to every rank, or sharded (FSDP2) where they do not fit. Trainable parameters are small and
always copied: an all-reduce sums their gradients (`engine.distributed.gradients`), and rank 0 alone can save them under
any layout.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dataloaders.errors import reason
from dataloaders.ranks import Ranks
from engine.distributed import private, start
from engine.distributed.watchdog import SETUP_TIMEOUT, Watchdog
from pite import devices
from pite.families import MODULES

# A decoder layer may return a view. That is safe: the next layer writes only to its own memory.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

T = TypeVar("T")

BACKSTOP_FACTOR = 4
"""The timeouts of the process group and of NCCL, whose messages name no rank, are this many times the watchdog's
longest."""

NCCL_DUMP = 15
"""Seconds that torch's own NCCL watchdog allows for a dump, its default. Four times that pass between an error, such as
a lost connection, and a C++ abort that names no rank. Our watchdog needs less, so its message comes first."""


@dataclass(frozen=True)
class World:
    """This process's rank among `size` and its device; `watchdog` monitors the other ranks."""

    rank: int
    size: int
    device: torch.device
    watchdog: Watchdog | None = None

    @staticmethod
    def join(device: str | None = None, stall: float = 600.0) -> World:
        """Read torchrun's environment and join its process group, if there is one: gloo, and NCCL on CUDA.

        stall  seconds without progress after which the watchdog ends the run
        Raises ValueError if this rank's device does not exist.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device cuda: {devices.unusable_gpu() or 'there is no NVIDIA GPU here'}")
        ranks = Ranks.read()
        rank, size = ranks.rank, ranks.size
        if kind == "cuda":
            grow_segments()
            local, there = ranks.local, torch.cuda.device_count()
            if local >= there:
                raise ValueError(
                    f"this node has {there} CUDA device{'s' if there > 1 else ''} and none is left "
                    f"for its process {local + 1}: start at most {there} here (torchrun --nproc-per-node {there})"
                )
            kind = f"cuda:{local}"
            torch.cuda.set_device(kind)
            devices.check_computes(torch.device(kind))
        if size == 1:
            return World(rank, size, torch.device(kind))
        return _join_group(ranks, torch.device(kind), stall)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_host_main(self) -> bool:
        """Whether this is the first rank of its host."""
        return self.size == 1 or Ranks.read().local == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 and return its result on every rank; for long work with the same result everywhere."""
        if self.size == 1:
            return make()
        shared = [make() if self.is_main else None]
        dist.broadcast_object_list(shared, src=0)
        return cast(T, shared[0])

    def from_host_main(self, make: Callable[[], T]) -> T:
        """Run `make` on the first rank of each host and return its result on the ranks of that host.

        For long work on files that each host may have of its own.
        """
        local = Ranks.read().local if self.size > 1 else 0
        return cast(T, self.gather(make() if self.is_host_main else None)[self.rank - local])

    def broadcast(self, tensor: Tensor) -> None:
        """Copy rank 0's values of a contiguous tensor to all ranks, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def agree(self, check: Callable[[], object]) -> None:
        """Run a check on every rank. If it fails on any, all raise the same ValueError, with rank and host unless all fail."""
        every = self.gather((_failure(check), socket.gethostname()))
        for rank, (sentence, host) in enumerate(every):
            if sentence is not None:
                everywhere = all(other == sentence for other, _ in every)
                raise ValueError(sentence if everywhere else f"rank {rank} ({host}): {sentence}")

    def agree_with_main(self, check: Callable[[], object]) -> None:
        """Run a check on rank 0 alone. If it fails, all ranks raise the same ValueError."""
        failed = self.from_main(lambda: _failure(check))
        if failed is not None:
            raise ValueError(failed)

    def ranks_per_host(self) -> int:
        """Ranks of each host, by torchrun. All ranks, where that is unknown or hosts have different numbers."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        return local if self.size % local == 0 and set(self.gather(local)) == {local} else self.size

    def shard_mesh(self, shards: int) -> DeviceMesh:
        """The mesh over which FSDP2 shards: all ranks, or groups of `shards` neighbours, each with all frozen weights.

        Frozen weights have no gradient, so the groups exchange nothing: a group inside a host keeps every gather there.
        """
        if shards == self.size:
            return init_device_mesh(self.device.type, (self.size,))
        assert self.watchdog is not None
        timeout = timedelta(seconds=_backstop(self.watchdog.stall))
        firsts = range(0, self.size, shards)
        groups = [dist.new_group([*range(first, first + shards)], timeout=timeout) for first in firsts]
        mine = groups[self.rank // shards]
        self.watchdog.count_collectives(mine, self.device.type)
        return DeviceMesh.from_group(mine, self.device.type)

    def set_status(self, status: str) -> None:
        """Set what this rank is doing, for the other ranks' message if it stalls."""
        if self.watchdog is not None:
            self.watchdog.set_status(status)

    def step_done(self) -> None:
        """Count an optimizer step as progress once the device has computed what was queued until now."""
        if self.watchdog is None:
            return
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self.watchdog.step_done(event)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def leave(self, reason: str | None = None) -> None:
        """Leave the process group: all ranks together, or this rank alone for a reason that the watchdog publishes."""
        if self.watchdog is None:
            return
        if reason is None:
            self.barrier()
        self.watchdog.close(reason or "")
        if reason is None:
            dist.destroy_process_group()


def _join_group(ranks: Ranks, device: torch.device, stall: float) -> World:
    """Connect to all other ranks. Raises ValueError, with host, port and remedy, where the network does not allow it."""
    start.check_restarts()
    start.choose_interface(ranks)
    store = start.connect(ranks.rank)
    # The store exists before the process group, so the watchdog can name a rank that never joins the group.
    watchdog = Watchdog(ranks.rank, ranks.size, stall, device)
    watchdog.set_status("connecting to the other ranks")
    try:
        if not dist.is_initialized():
            _init_process_group(dist.PrefixStore(f"pite/{start.attempt()}", store), ranks, device, stall)
    except RuntimeError as error:
        cause = watchdog.diagnose() or f"{reason(error)}: {start.network_hint()}"
        watchdog.close(cause)
        raise ValueError(f"the ranks do not connect to each other: {cause}") from error
    watchdog.attach_process_group()
    return World(ranks.rank, ranks.size, device, watchdog)


def _backstop(stall: float) -> float:
    return BACKSTOP_FACTOR * max(SETUP_TIMEOUT, stall)


def _init_process_group(store: dist.Store, ranks: Ranks, device: torch.device, stall: float) -> None:
    on_gpu = device.type == "cuda"
    backstop = _backstop(stall)
    if private.has_nccl2():
        # Its abort would name no rank, and come before our watchdog ends the process.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(1000 * NCCL_DUMP))
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{backstop:.0f}")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.size,
        device_id=device if on_gpu else None,
        timeout=timedelta(seconds=backstop),
    )


def _failure(check: Callable[[], object]) -> str | None:
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def grow_segments() -> None:
    """Let CUDA's allocator grow its segments. Call before its first use.

    Micro-batches differ in length, and segments of fixed size would fragment the memory.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def use_deterministic_algorithms() -> None:
    """Let every operation repeat bitwise on a GPU, or raise RuntimeError. Call before cuBLAS is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def shard_frozen(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of a decoder layer, or in the last call of the rest of a model, over a mesh (FSDP2).

    A layer's weights are gathered while it computes, forward and backward. Adapter, heads and LoRA stay whole on every
    rank.
    """
    from torch.distributed.fsdp import fully_shard

    whole = {p for name, p in module.named_parameters() if "lora_" in name or name.startswith(MODULES)}
    fully_shard(module, mesh=mesh, ignored_params=whole)
