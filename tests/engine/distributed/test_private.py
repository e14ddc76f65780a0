"""Private interfaces of torch that the engine uses: a new version of torch may remove or change one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from engine.distributed import private
from tests.engine.distributed.ranks import launch


def count_collectives() -> int:
    """Counts of this rank, before and after collectives in the group of all ranks and in one of its own."""
    dist.init_process_group("gloo")
    group = private.default_group()
    assert group is dist.group.WORLD
    backend = private.backend_of(group, "cpu")
    own = private.backend_of(dist.new_group([dist.get_rank()], use_local_synchronization=True), "cpu")
    before = private.collectives_begun(backend), private.collectives_begun(own)
    for _ in range(3):
        dist.all_reduce(torch.ones(1))
    assert private.collectives_begun(backend) - before[0] == 3
    assert private.collectives_begun(own) == before[1]
    return 0


def test_a_rank_counts_the_collectives_that_it_has_begun(tmp_path: Path):
    ranks = launch(2, tmp_path, count_collectives)
    assert ranks.wait() == [0, 0], ranks.stderr(0)


def test_nccl2_came_with_torch_2_14():
    major, minor = map(int, torch.__version__.split(".")[:2])
    # A CPU build has no NCCL.
    assert private.has_nccl2() == (dist.is_nccl_available() and (major, minor) >= (2, 14))
