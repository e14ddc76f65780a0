"""Ranks that do not run the same thing are refused before the first step, with the first difference.

Otherwise they would train on without a message, and the result would be wrong: the sum of the gradients of two data sets, seeds
or versions of the code is the gradient of neither.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataloaders.cli import dump
from dataloaders.files import sha256
from engine.config import TrainConfig
from engine.distributed.world import World
from engine.identity import Identity, first_difference
from engine.layout import Layout
from pite.model import PiTe
from pite_kernels.attention import choose_backend
from pite_kernels.dispatch import backend_name

_PACKAGES = ("engine", "pite", "dataloaders", "pite_kernels")
_OF_A_HOST = ("data", "store", "cache", "transcripts", "llm", "init", "workers", "log-level", "measured", "wandb")
"""Flags that may differ between hosts: paths of the same files, and what changes no number."""


def check_same_command(world: World, config: TrainConfig) -> None:
    """Raise ValueError, on all ranks, if a rank has other flags, code or versions than rank 0.

    Call before any other collective: which ones follow depends on the flags.
    """
    flags = {name: value for group in dump(config).values() for name, value in group.items() if name not in _OF_A_HOST}
    code = {package: _checksum_of_code(package) for package in _PACKAGES}
    if world.device.type == "cpu":
        code["pite_kernels' C++ operators"] = _checksum_of_operators()
    _check_same(world, {"flags": flags, "code": code, "versions": _versions()})


def check_same_run(world: World, identity: Identity, layout: Layout, steps: int) -> None:
    """Raise ValueError, on all ranks, if a rank would train something else than rank 0.

    Compared are the identity (data, features, recipe, model), the layout, the number of steps and the back ends.
    """
    shape = identity.model.arithmetic["attention_heads"]  # heads of queries, of keys, their dimension
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[identity.dtype]
    _check_same(
        world,
        {
            **identity.as_dict(),
            "steps": steps,
            "layout": {"shards": layout.shards, "recompute": layout.recompute, "token_budget": layout.token_budget},
            "attention": choose_backend(world.device, dtype, *shape),
            "losses": backend_name(world.device, dtype),
        },
    )


def check_same_weights(world: World, model: PiTe, step: int) -> None:
    """Raise ValueError, on all ranks, if a trainable parameter of a rank differs from rank 0's.

    Compared are checksums of the parameters' bits, computed on the device; the host waits for them.
    """
    if world.size > 1:
        named = dict(model.trainable())
        sums = torch.stack([_sum_of_bits(parameter) for parameter in named.values()]).tolist()
        _check_same(
            world,
            {f"after step {step}, the checksum of the parameter {name}": total for name, total in zip(named, sums)},
        )


def _check_same(world: World, values: Mapping[str, Any]) -> None:
    if world.size == 1:
        return
    ranks = world.gather((socket.gethostname(), values))
    (first, expected), *others = ranks
    for rank, (host, found) in enumerate(others, start=1):
        difference = first_difference(expected, found)
        if difference is not None:
            name, was, now = difference
            raise ValueError(
                f"rank {rank} ({host}) does not run what rank 0 ({first}) runs: {name} is {now} on rank {rank} and {was} on "
                "rank 0"
            )


def _sum_of_bits(parameter: Tensor) -> Tensor:
    """The sum of a parameter's bits, as whole numbers weighted by their position; exact, in any order."""
    bits = parameter.detach().flatten().view(torch.int32).long()
    weights = torch.arange(1, len(bits) + 1, device=bits.device) % 65_521 + 1
    return (bits * weights).sum()


@cache
def _checksum_of_code(package: str) -> str:
    """16 hexadecimal digits of a checksum of all Python files of a package."""
    folder = Path(str(import_module(package).__file__)).parent
    content = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return content.hexdigest()[:16]


def _checksum_of_operators() -> str:
    """The same of the compiled C++ operators, which only a CPU uses; "none" where they are not compiled."""
    folder = Path(str(import_module("pite_kernels").__file__)).parent
    return next((sha256(file)[:16] for file in sorted(folder.glob("_C*.so"))), "none")


def _versions() -> dict[str, str | None]:
    known = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return known | {name: _version_of(name) for name in ("triton", "flash-attn", "liger-kernel", "transformers")}


def _version_of(distribution: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(distribution)
    return None
