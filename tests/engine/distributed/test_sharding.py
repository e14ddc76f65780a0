"""The collectives of a step on one host, and weights that are sharded inside each host of several."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.distributed.world import World
from engine.layout import choose_layout, count_parameters
from engine.metrics import read_metrics
from engine.recipes import recipe
from engine.train import main
from pite.config import PiTeConfig
from tests.engine.distributed.ranks import train
from tests.engine.workspace import train_arguments

COUNT = """
import json
from engine import loop, run
from tests.operators import Operators
train_loop = loop.train
def counted(*rest, **named):
    steps = train_loop(*rest, **named)
    def next_step():
        with Operators() as operators: result = next(steps, None)
        if result is not None and result.step == 2:
            with open(f"OUTPUT/operators{rank}.json", "w") as file: json.dump(operators.names, file)
        return result
    try: yield from iter(next_step, None)
    finally: steps.close()
run.train = counted"""

TWO_BY_TWO = """
import os
os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2), "GLOO_SOCKET_IFNAME": "lo"}
import torch.distributed as dist
from engine import build
shard = build.shard_frozen
def noted(module, mesh):
    assert mesh.size() == 2 and dist.get_process_group_ranks(mesh.get_group()) == [rank // 2 * 2, rank // 2 * 2 + 1]
    return shard(module, mesh)
build.shard_frozen = noted"""


def collectives(names: list[str]) -> Counter[str]:
    return Counter(name for name in names if name.startswith(("c10d::", "_c10d", "fsdp::")))


REDUCTIONS = {"c10d::allreduce_": 2}
GATHERS = {name: 5 for name in ("fsdp::all_gather_copy_in", "c10d::_allgather_base_", "fsdp::split_with_sizes_copy")}
"""Two layers forward and backward, and the rest of the model."""


@pytest.mark.parametrize("parallel, expected", [("ddp", REDUCTIONS), ("fsdp", REDUCTIONS | GATHERS)])
def test_the_collectives_of_a_step_on_one_host(
    workspace: Path, tmp_path: Path, parallel: str, expected: dict[str, int]
):
    """All ranks begin the same ones: an all-reduce of the gradients and one of the numbers; with FSDP2, the gathers."""
    arguments = train_arguments(workspace, tmp_path, "1", parallel=parallel, max_steps=2, checkpoint_every=1000)
    ranks = train(2, tmp_path / "logs", arguments, COUNT.replace("OUTPUT", str(tmp_path)))
    assert ranks.wait() == [0, 0], ranks.stderr(0)
    one, other = (json.loads((tmp_path / f"operators{rank}.json").read_text()) for rank in range(2))
    assert collectives(one) == collectives(other) == expected


WIRE = """
import json
import torch.distributed as dist
reduce, dtypes = dist.all_reduce, []
def noted(tensor, **rest):
    dtypes.append(str(tensor.dtype))
    return reduce(tensor, **rest)
dist.all_reduce = noted
from engine import run
step = run.train
def noting(*rest, **named):
    yield from step(*rest, **named)
    with open(f"OUTPUT/dtypes{rank}.json", "w") as file: json.dump(dtypes, file)
run.train = noting"""


def test_gradients_cross_the_network_in_bfloat16(workspace: Path, tmp_path: Path):
    """The numbers of a step stay in float32. The losses differ by no more than bfloat16 rounds."""
    arguments = train_arguments(workspace, tmp_path / "two", "1", reduce_dtype="bfloat16")
    ranks = train(2, tmp_path / "logs", arguments, WIRE.replace("OUTPUT", str(tmp_path)))
    assert ranks.wait() == [0, 0], ranks.stderr(0)
    dtypes = json.loads((tmp_path / "dtypes0.json").read_text())
    assert dtypes == ["torch.bfloat16", "torch.float32"] * 6
    assert main(train_arguments(workspace, tmp_path / "one", "1", dtype="float32")) == 0
    one, two = (read_metrics(tmp_path / name / "stage1" / "metrics.jsonl") for name in ("one", "two"))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5), "before the first update"
    assert two[0]["gradient_norm"] != one[0]["gradient_norm"]
    for a, b in zip(one, two):
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=2**-7)
        assert b["loss"] == pytest.approx(a["loss"], rel=2**-7)


@pytest.mark.parametrize("stall", [False, True])
def test_weights_are_sharded_inside_each_host(workspace: Path, tmp_path: Path, stall: bool):
    """Two hosts of two ranks have the losses of one process; a rank that stalls in a layer is named."""
    code = TWO_BY_TWO
    if stall:
        code += """
import time
from pite import decoder
compute, calls = decoder.DecoderLayer._compute, []
def stalling(*rest):
    calls.append(0)
    if rank == 3 and len(calls) == 6: time.sleep(1000)
    return compute(*rest)
decoder.DecoderLayer._compute = stalling"""
    arguments = train_arguments(workspace, tmp_path / "two", "1", parallel="fsdp", stall_timeout=4 if stall else 600)
    ranks = train(4, tmp_path / "logs", arguments, code)
    if stall:
        assert ranks.wait(40) == [1] * 4
        assert "the others wait for rank 3 (" in ranks.stderr(0), ranks.stderr(0)
        return
    assert ranks.wait() == [0] * 4, ranks.stderr(0)
    assert "weights sharded over 2 (FSDP2)" in ranks.stderr(0)
    assert main(train_arguments(workspace, tmp_path / "one", "1", dtype="float32")) == 0
    one, two = (read_metrics(tmp_path / name / "stage1" / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        for name in ("loss", "ce", "l1", "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), name


def test_all_hosts_share_the_weights_only_where_one_host_is_too_small():
    config = PiTeConfig.preset("13b")
    count = count_parameters(config, recipe("13b", 2))
    shards = [
        choose_layout(
            config, count, gigabytes * 1e9, ranks=16, per_host=per_host, parallel=parallel, longest=2048
        ).shards
        for gigabytes, per_host, parallel in (
            (80, 8, "auto"),
            (40, 8, "auto"),
            (80, 8, "fsdp"),
            (24, 2, "fsdp"),
            (40, 1, "auto"),
        )
    ]
    assert shards == [1, 8, 8, 16, 16]


def test_the_number_of_ranks_per_host_is_torchruns(monkeypatch: pytest.MonkeyPatch):
    world = World(0, 1, torch.device("cpu"))
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * self.size)
    assert os.environ.get("LOCAL_WORLD_SIZE") is None and world.ranks_per_host() == 1
    for size, local, expected in ((4, "2", 2), (6, "4", 6), (8, "8", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert World(0, size, world.device).ranks_per_host() == expected
