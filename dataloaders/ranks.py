"""The rank of this process, from torchrun's environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """`rank` of `size` processes, `local` of `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @staticmethod
    def read() -> Ranks:
        """Read torchrun's environment; without it, a single process."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return Ranks(*(int(os.environ.get(name, default)) for name, default in names.items()))


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 1, of work that several hosts share without a connection between them."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str | None) -> Part:
        """Read `2/3`; None is the whole. Raises ValueError for anything else."""
        if text is None:
            return Part()
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return Part(int(number), int(count))
        raise ValueError(f"--part is a number and their count, such as 2/3 for the second of three hosts, not {text!r}")

    def writer(self, rank: int) -> int:
        """A number for this part's rank that no rank of another part has."""
        return (self.number - 1) * _MOST_RANKS + rank


_MOST_RANKS = 1000
"""More than the ranks of one part."""


def check_one_host(program: str) -> None:
    """Raise ValueError where one torchrun spans several hosts: it ends the slower ones five minutes after the first is done."""
    ranks = Ranks.read()
    if ranks.size > ranks.local_size and "TORCHELASTIC_RUN_ID" in os.environ:
        hosts = int(os.environ.get("GROUP_WORLD_SIZE", 2))
        raise ValueError(
            f"{program} does not run under one torchrun on {hosts} hosts, which would end the slower ones: start on each "
            f"`torchrun --standalone --nproc-per-node {ranks.local_size} -m {program} ... --part i/{hosts}`, i from 1"
        )


ALONE = Ranks()
